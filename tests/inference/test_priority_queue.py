"""Background requests: all others overtake them, and they get a small share. No threads here."""

import pytest

from embedding_service.inference.fair_queue import BULK_OVERHEADS, Flow
from embedding_service.inference.priority_queue import NORMAL_PER_BACKGROUND, PriorityQueue
from tests.inference import test_fair_queue
from tests.inference.test_fair_queue import padded

BOTH = pytest.mark.parametrize("separate_bulk", [False, True], ids=["mixed", "bulk apart"])
SHARE = 1 / (NORMAL_PER_BACKGROUND + 1)


class Driven(test_fair_queue.Driven):
    """A queue with both kinds of requests."""

    kind = PriorityQueue


def share_of_background(driven: Driven, background: list[Flow], normal: list[Flow], batches: int) -> float:
    """Of the tokens served; each request is followed by another one like it, as from a client that waits."""
    served = {True: 0, False: 0}
    waiting = [*background, *normal]
    for _ in range(batches):
        for flow, rows in driven.batch():
            served[flow.background] += sum(driven.lengths[flow][row] for row in rows)
        for index, flow in enumerate(waiting):
            if not flow.tokens:
                driven.queue.remove(flow)
                waiting[index] = driven.add(*driven.lengths[flow], background=flow.background)
    return served[True] / sum(served.values())


@BOTH
@pytest.mark.parametrize("size", [1, 100], ids=["small", "bulk"])
def test_later_requests_overtake_the_background(separate_bulk, size):
    driven = Driven(separate_bulk=separate_bulk)
    background = driven.add(*[32] * 200, background=True)
    driven.batch()
    normal = driven.add(*[32] * size)
    while normal.tokens:
        assert [flow for flow, _ in driven.batch()] == [normal]
    assert [flow for flow, _ in driven.batch()] == [background]


def test_the_background_shares_no_batch_with_others():
    driven = Driven(10_000, 10_000)
    driven.add(32, background=True)
    driven.add(32)
    assert [len(batch) for batch in driven.drain()] == [1, 1]


@BOTH
@pytest.mark.parametrize("normal", [1, 400], ids=["beside small", "beside bulk"])
@pytest.mark.parametrize("texts", [1, 4, 400])
@pytest.mark.parametrize("clients", [1, 16])
def test_the_background_has_a_small_share_however_its_texts_are_sent(separate_bulk, normal, texts, clients):
    driven = Driven(64, separate_bulk=separate_bulk)
    background = [driven.add(*[32] * texts, background=True) for _ in range(clients)]
    others = [driven.add(*[32] * normal) for _ in range(2)]
    share = share_of_background(driven, background, others, 2000)
    assert SHARE / 2 < share < SHARE * 1.1


def test_requests_in_the_background_share_what_they_get():
    driven = Driven(64)
    first, second = (driven.add(*[32] * 40, background=True) for _ in range(2))
    while first.tokens and second.tokens:
        driven.batch()
    assert first.tokens + second.tokens <= 64


def test_background_batches_are_short_while_small_requests_arrive():
    driven = Driven(1000, 40, separate_bulk=True)
    driven.add(*[10] * 500, background=True)
    assert padded(driven.sizes(driven.batch())) == 1000
    driven.add(10)
    driven.batch()
    assert padded(driven.sizes(driven.batch())) == 40 * BULK_OVERHEADS


def test_removed_or_late_texts_do_not_delay_the_other_kind():
    for background in (False, True):
        driven = Driven()
        gone = driven.add(9, background=background)
        late = driven.add(9, deadline=1.0, background=background)
        fine = driven.add(9, background=not background)
        driven.queue.remove(gone)
        driven.now = 2.0
        assert [flow for batch in driven.drain() for flow, _ in batch] == [fine]
        assert driven.expired == [late]
