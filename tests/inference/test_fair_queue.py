"""The queue: what a batch holds, whose turn it is, and what padding costs. No threads here."""

import random
from collections import Counter

import numpy as np
import pytest

from embedding_service.inference.fair_queue import (
    BULK_OVERHEADS,
    NORMAL_PER_BACKGROUND,
    PADDING_SHARE,
    SMALL_AGO_SECONDS,
    SMALL_REQUEST_TEXTS,
    WINDOW_TEXTS,
    FairQueue,
    QueueEntry,
    densest,
)
from tests.inference.fake_runtime import lengths

Batch = list[tuple[QueueEntry, list[int]]]

# What requests in the background get beside others.
SHARE = 1 / (NORMAL_PER_BACKGROUND + 1)


class Driven:
    """A queue with a clock that the test sets, and the length of every text."""

    def __init__(self, budget: int = 256, overhead: int = 16, *, on_cpu: bool = False) -> None:
        self.queue = FairQueue(on_cpu=on_cpu)
        self.budget, self.overhead = budget, overhead
        self.now = 0.0
        self.lengths: dict[QueueEntry, list[int]] = {}
        self.expired: list[QueueEntry] = []

    def add(
        self,
        *texts: int,
        group: object = None,
        deadline: float = 1e9,
        push: bool = True,
        background: bool = False,
    ) -> QueueEntry:
        entry = QueueEntry(
            owner=None,
            deadline=deadline,
            bulk=len(texts) > SMALL_REQUEST_TEXTS,
            background=background,
            left=sum(texts),
        )
        self.queue.add(entry, self.now)
        self.lengths[entry] = list(texts)
        if push:
            self.push(entry, range(len(texts)), group)
        return entry

    def push(self, entry: QueueEntry, rows: range, group: object = None) -> None:
        own = np.array(self.lengths[entry], np.int32)
        self.queue.push(
            entry, own[rows.start : rows.stop], np.arange(rows.start, rows.stop, dtype=np.int32), group
        )

    def batch(self) -> Batch:
        limit = self.queue.bulk_limit(self.budget, self.overhead, self.now)
        taken, tokens, late = self.queue.take(self.budget, limit, self.overhead, self.now)
        self.expired += late
        assert tokens == sum(self.lengths[entry][row] for entry, rows in taken for row in rows.tolist())
        return [(entry, rows.tolist()) for entry, rows in taken]

    def sizes(self, batch: Batch) -> list[int]:
        return [self.lengths[entry][row] for entry, rows in batch for row in rows]

    def drain(self) -> list[Batch]:
        batches = []
        while self.queue:
            batches.append(self.batch())
        return [batch for batch in batches if batch]


def padded(sizes: list[int]) -> int:
    return max(sizes) * len(sizes)


# Batches


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("on_cpu", [False, True], ids=["mixed", "bulk apart"])
def test_every_text_is_taken_once_and_no_batch_exceeds_the_budget(seed, on_cpu):
    driven = Driven(512, 64, on_cpu=on_cpu)
    chance = random.Random(seed)
    for name in range(60):
        driven.add(*lengths(seed * 100 + name, chance.choice([1, 1, 2, 5, 40])))
    batches = driven.drain()
    assert max(padded(driven.sizes(batch)) for batch in batches) <= 512
    taken = Counter((entry, row) for batch in batches for entry, rows in batch for row in rows)
    assert taken == Counter((entry, row) for entry, own in driven.lengths.items() for row in range(len(own)))


def test_a_text_longer_than_the_budget_has_a_batch_of_its_own():
    driven = Driven(100)
    driven.add(250, 10, 10, 300)
    assert sorted(map(driven.sizes, driven.drain())) == [[10, 10], [250], [300]]


@pytest.mark.parametrize("on_cpu", [False, True], ids=["mixed", "bulk apart"])
@pytest.mark.parametrize(("budget", "overhead"), [(256, 16), (8192, 2048)], ids=["CPU", "GPU"])
@pytest.mark.parametrize("texts", [1, 16, 300])
def test_padding_of_a_log_normal_mix_under_load_is_small(budget, overhead, on_cpu, texts):
    driven = Driven(budget, overhead, on_cpu=on_cpu)
    for name in range(9600 // texts):
        driven.add(*lengths(name, texts))
    asked = computed = 0
    waiting = 9600 // texts * texts
    for batch in driven.drain():
        sizes = driven.sizes(batch)
        if waiting > WINDOW_TEXTS:
            asked, computed = asked + sum(sizes), computed + padded(sizes)
        waiting -= len(sizes)
    assert computed - asked <= 0.10 * computed


def test_short_texts_fill_the_budget():
    driven = Driven(256)
    for _ in range(320):
        driven.add(8)
    assert [len(driven.sizes(batch)) for batch in driven.drain()] == [32] * 10


def test_padding_that_costs_less_than_another_batch_is_accepted_if_nothing_else_waits():
    driven = Driven(1000, 200)
    driven.add(100)
    driven.add(10)
    assert len(driven.drain()) == 1
    driven.overhead = 50
    driven.add(100)
    driven.add(10)
    assert len(driven.drain()) == 2


def test_only_texts_of_one_group_share_a_batch():
    driven = Driven()
    entries = {driven.add(8, group=number % 2): number % 2 for number in range(40)}
    batches = driven.drain()
    assert all(len({entries[entry] for entry, _ in batch}) == 1 for batch in batches)
    assert len(batches) == 2


def test_bulk_and_small_requests_share_no_batch_if_bulk_is_separate():
    driven = Driven(10_000, 10_000, on_cpu=True)
    driven.add(*[10] * 50)
    driven.add(10)
    assert sorted(len(driven.sizes(batch)) for batch in driven.drain()) == [1, 50]
    driven = Driven(10_000, 10_000)
    driven.add(*[10] * 50)
    driven.add(10)
    assert [len(driven.sizes(batch)) for batch in driven.drain()] == [51]


def test_bulk_batches_are_short_while_small_requests_arrive():
    driven = Driven(1000, 40, on_cpu=True)
    driven.add(*[10] * 500)
    assert padded(driven.sizes(driven.batch())) == 1000
    driven.add(10)
    driven.batch()
    assert padded(driven.sizes(driven.batch())) == 40 * BULK_OVERHEADS
    driven.now += SMALL_AGO_SECONDS + 0.1
    assert padded(driven.sizes(driven.batch())) == 1000


@pytest.mark.parametrize("seed", range(20))
def test_the_densest_range_is_the_best_one(seed):
    chance = random.Random(seed)
    own = sorted(lengths(seed, chance.randint(1, 25)))
    head, limit, free = chance.randrange(len(own)), chance.choice([64, 256, 1000]), chance.choice([0, 30])

    def tokens(low: int, high: int) -> int:
        part = own[low:high]
        waste = padded(part) - sum(part)
        fits = padded(part) <= limit and waste <= max(free, PADDING_SHARE * padded(part))
        return sum(part) if fits else 0

    ranges = [(low, high) for low in range(head + 1) for high in range(head + 1, len(own) + 1)]
    low, high = densest(np.array(own, np.int32), head, limit, free)
    assert low <= head < high
    assert tokens(low, high) == max(tokens(*one) for one in ranges)


# Order


@pytest.mark.parametrize("on_cpu", [False, True], ids=["mixed", "bulk apart"])
def test_a_single_text_overtakes_a_bulk_request_after_the_batch_in_flight(on_cpu):
    """Whenever it arrives: one is sent during every third batch of a bulk request."""
    driven = Driven(on_cpu=on_cpu)
    driven.add(*lengths(7, 2048))
    number, sent, waits = 0, {}, []
    while driven.queue:
        batch = driven.batch()
        waits += [number - sent.pop(entry) for entry, _ in batch if entry in sent]
        if number % 3 == 0 and driven.queue:
            sent[driven.add(12)] = number
        number += 1
    assert len(waits) > 50
    assert not sent
    assert max(waits) == 1


def share_of_bulk(driven: Driven, bulk: QueueEntry, singles: int, length: int = 32) -> float:
    """The bulk request's share of tokens until it is done, against clients that always send another text."""
    for _ in range(singles):
        driven.add(length)
    served = Counter()
    while bulk.tokens:
        for entry, rows in driven.batch():
            served[entry is bulk] += sum(driven.lengths[entry][row] for row in rows)
            if entry is not bulk:
                driven.queue.remove(entry)
                driven.add(length)
    return served[True] / served.total()


@pytest.mark.parametrize("texts", [9, 256])
def test_a_bulk_request_is_not_starved_by_single_texts(texts):
    driven = Driven(on_cpu=True)
    # Its share among 9 entries, allowing for rounding.
    assert share_of_bulk(driven, driven.add(*[32] * texts), 8) > 1 / 9 / 2


def test_bulk_requests_share_the_model_evenly():
    driven = Driven()
    entries = [driven.add(*lengths(seed, 1000)) for seed in range(4)]
    served = Counter()
    while all(entry.tokens for entry in entries):
        for entry, rows in driven.batch():
            served[entry] += sum(driven.lengths[entry][row] for row in rows)
        # In whatever order they take turns, none is more than three batches ahead.
        assert max(served[entry] for entry in entries) - min(served[entry] for entry in entries) <= 3 * 256


def test_a_small_request_goes_first_if_both_have_their_turn():
    driven = Driven(on_cpu=True)
    bulk, small = driven.add(*[10] * 20), driven.add(10)
    assert [[entry for entry, _ in driven.batch()] for _ in range(2)] == [[small], [bulk]]


def test_pieces_of_a_request_queue_one_after_another():
    driven = Driven()
    entry = driven.add(*lengths(3, 300), push=False)
    driven.push(entry, range(128))
    first = driven.batch()
    driven.push(entry, range(128, 256))
    driven.push(entry, range(256, 300))
    rows = [row for batch in [first, *driven.drain()] for _, rows in batch for row in rows]
    assert sorted(rows) == list(range(300))


# Texts that leave


def test_late_texts_are_returned_and_never_in_a_batch():
    driven = Driven()
    late, late_bulk = driven.add(9, deadline=1.0), driven.add(*[9] * 300, deadline=1.0)
    fine = driven.add(9, deadline=9.0)
    driven.now = 2.0
    assert [entry for batch in driven.drain() for entry, _ in batch] == [fine]
    assert set(driven.expired) == {late, late_bulk}


def test_removed_texts_are_never_in_a_batch():
    driven = Driven()
    gone, fine = driven.add(9, 9), driven.add(9)
    driven.queue.remove(gone)
    assert [entry for batch in driven.drain() for entry, _ in batch] == [fine]


# Requests in the background

BOTH = pytest.mark.parametrize("on_cpu", [False, True], ids=["mixed", "bulk apart"])


def share_of_background(
    driven: Driven, background: list[QueueEntry], normal: list[QueueEntry], batches: int
) -> float:
    """Of the tokens served; each request is followed by another one like it, as from a client that waits."""
    served = {True: 0, False: 0}
    waiting = [*background, *normal]
    for _ in range(batches):
        for entry, rows in driven.batch():
            served[entry.background] += sum(driven.lengths[entry][row] for row in rows)
        for index, entry in enumerate(waiting):
            if not entry.tokens:
                driven.queue.remove(entry)
                waiting[index] = driven.add(*driven.lengths[entry], background=entry.background)
    return served[True] / sum(served.values())


@BOTH
@pytest.mark.parametrize("size", [1, 100], ids=["small", "bulk"])
def test_later_requests_overtake_the_background(on_cpu, size):
    driven = Driven(on_cpu=on_cpu)
    background = driven.add(*[32] * 200, background=True)
    driven.batch()
    normal = driven.add(*[32] * size)
    while normal.tokens:
        assert [entry for entry, _ in driven.batch()] == [normal]
    assert [entry for entry, _ in driven.batch()] == [background]


def test_the_background_shares_no_batch_with_others():
    driven = Driven(10_000, 10_000)
    driven.add(32, background=True)
    driven.add(32)
    assert [len(batch) for batch in driven.drain()] == [1, 1]


@BOTH
@pytest.mark.parametrize("normal", [1, 400], ids=["beside small", "beside bulk"])
@pytest.mark.parametrize("texts", [1, 4, 400])
@pytest.mark.parametrize("clients", [1, 16])
def test_the_background_has_a_small_share_however_its_texts_are_sent(on_cpu, normal, texts, clients):
    driven = Driven(64, on_cpu=on_cpu)
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
    driven = Driven(1000, 40, on_cpu=True)
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
        assert [entry for batch in driven.drain() for entry, _ in batch] == [fine]
        assert driven.expired == [late]


def test_background_beside_small_requests_is_served_if_a_batch_costs_nothing_besides_its_tokens():
    driven = Driven(overhead=0, on_cpu=True)
    driven.add(8)
    driven.add(*[16] * 40, background=True)
    assert sum(len(rows) for batch in driven.drain() for _, rows in batch) == 41
