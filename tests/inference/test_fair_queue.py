"""The queue: what a batch holds, whose turn it is, and what padding costs. No threads here."""

import random
from collections import Counter

import numpy as np
import pytest

from embedding_service.inference.fair_queue import (
    BULK_OVERHEADS,
    PADDING_SHARE,
    SMALL_AGO_SECONDS,
    WINDOW_TEXTS,
    FairQueue,
    Flow,
    densest,
)
from embedding_service.inference.priority_queue import PriorityQueue
from tests.inference.fake_runtime import lengths

Batch = list[tuple[Flow, list[int]]]


class Driven:
    """A queue with a clock that the test sets, and the length of every text."""

    kind: type[FairQueue] | type[PriorityQueue] = FairQueue

    def __init__(self, budget: int = 256, overhead: int = 16, *, separate_bulk: bool = False) -> None:
        self.queue = self.kind(separate_bulk=separate_bulk)
        self.budget, self.overhead = budget, overhead
        self.now = 0.0
        self.lengths: dict[Flow, list[int]] = {}
        self.expired: list[Flow] = []

    def add(
        self,
        *texts: int,
        group: object = None,
        deadline: float = 1e9,
        push: bool = True,
        background: bool = False,
    ) -> Flow:
        flow = Flow(texts=[str(length) for length in texts], deadline=deadline, background=background)
        self.queue.add(flow, self.now)
        self.lengths[flow] = list(texts)
        if push:
            self.push(flow, range(len(texts)), group)
        return flow

    def push(self, flow: Flow, rows: range, group: object = None) -> None:
        own = np.array(self.lengths[flow], np.int32)
        self.queue.push(
            flow, own[rows.start : rows.stop], np.arange(rows.start, rows.stop, dtype=np.int32), group
        )

    def batch(self) -> Batch:
        taken, expired = self.queue.next_batch(self.budget, self.overhead, self.now)
        self.expired += expired
        return [(flow, rows.tolist()) for flow, rows in taken]

    def sizes(self, batch: Batch) -> list[int]:
        return [self.lengths[flow][row] for flow, rows in batch for row in rows]

    def drain(self) -> list[Batch]:
        batches = []
        while self.queue:
            batches.append(self.batch())
        return [batch for batch in batches if batch]


def padded(sizes: list[int]) -> int:
    return max(sizes) * len(sizes)


# Batches


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("separate_bulk", [False, True], ids=["mixed", "bulk apart"])
def test_every_text_is_taken_once_and_no_batch_exceeds_the_budget(seed, separate_bulk):
    driven = Driven(512, 64, separate_bulk=separate_bulk)
    chance = random.Random(seed)
    for name in range(60):
        driven.add(*lengths(seed * 100 + name, chance.choice([1, 1, 2, 5, 40])))
    batches = driven.drain()
    assert max(padded(driven.sizes(batch)) for batch in batches) <= 512
    taken = Counter((flow, row) for batch in batches for flow, rows in batch for row in rows)
    assert taken == Counter((flow, row) for flow, own in driven.lengths.items() for row in range(len(own)))


def test_a_text_longer_than_the_budget_has_a_batch_of_its_own():
    driven = Driven(100)
    driven.add(250, 10, 10, 300)
    assert sorted(map(driven.sizes, driven.drain())) == [[10, 10], [250], [300]]


@pytest.mark.parametrize("separate_bulk", [False, True], ids=["mixed", "bulk apart"])
@pytest.mark.parametrize(("budget", "overhead"), [(256, 16), (8192, 2048)], ids=["CPU", "GPU"])
@pytest.mark.parametrize("texts", [1, 16, 300])
def test_padding_of_a_log_normal_mix_under_load_is_small(budget, overhead, separate_bulk, texts):
    driven = Driven(budget, overhead, separate_bulk=separate_bulk)
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
    flows = {driven.add(8, group=number % 2): number % 2 for number in range(40)}
    batches = driven.drain()
    assert all(len({flows[flow] for flow, _ in batch}) == 1 for batch in batches)
    assert len(batches) == 2


def test_bulk_and_small_requests_share_no_batch_if_bulk_is_separate():
    driven = Driven(10_000, 10_000, separate_bulk=True)
    driven.add(*[10] * 50)
    driven.add(10)
    assert sorted(len(driven.sizes(batch)) for batch in driven.drain()) == [1, 50]
    driven = Driven(10_000, 10_000)
    driven.add(*[10] * 50)
    driven.add(10)
    assert [len(driven.sizes(batch)) for batch in driven.drain()] == [51]


def test_bulk_batches_are_short_while_small_requests_arrive():
    driven = Driven(1000, 40, separate_bulk=True)
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


@pytest.mark.parametrize("separate_bulk", [False, True], ids=["mixed", "bulk apart"])
def test_a_single_text_overtakes_a_bulk_request_after_the_batch_in_flight(separate_bulk):
    """Whenever it arrives: one is sent during every third batch of a bulk request."""
    driven = Driven(separate_bulk=separate_bulk)
    driven.add(*lengths(7, 2048))
    number, sent, waits = 0, {}, []
    while driven.queue:
        batch = driven.batch()
        waits += [number - sent.pop(flow) for flow, _ in batch if flow in sent]
        if number % 3 == 0 and driven.queue:
            sent[driven.add(12)] = number
        number += 1
    assert len(waits) > 50
    assert not sent
    assert max(waits) == 1


def share_of_bulk(driven: Driven, bulk: Flow, singles: int, length: int = 32) -> float:
    """The bulk request's share of tokens until it is done, against clients that always send another text."""
    for _ in range(singles):
        driven.add(length)
    served = Counter()
    while bulk.tokens:
        for flow, rows in driven.batch():
            served[flow is bulk] += sum(driven.lengths[flow][row] for row in rows)
            if flow is not bulk:
                driven.queue.remove(flow)
                driven.add(length)
    return served[True] / served.total()


@pytest.mark.parametrize("texts", [9, 256])
def test_a_bulk_request_is_not_starved_by_single_texts(texts):
    driven = Driven(separate_bulk=True)
    # Its share among 9 flows, allowing for rounding.
    assert share_of_bulk(driven, driven.add(*[32] * texts), 8) > 1 / 9 / 2


def test_bulk_requests_share_the_model_evenly():
    driven = Driven()
    flows = [driven.add(*lengths(seed, 1000)) for seed in range(4)]
    served = Counter()
    while all(flow.tokens for flow in flows):
        for flow, rows in driven.batch():
            served[flow] += sum(driven.lengths[flow][row] for row in rows)
        # In whatever order they take turns, none is more than three batches ahead.
        assert max(served[flow] for flow in flows) - min(served[flow] for flow in flows) <= 3 * 256


def test_a_small_request_goes_first_if_both_have_their_turn():
    driven = Driven(separate_bulk=True)
    bulk, small = driven.add(*[10] * 20), driven.add(10)
    assert [[flow for flow, _ in driven.batch()] for _ in range(2)] == [[small], [bulk]]


def test_pieces_of_a_request_queue_one_after_another():
    driven = Driven()
    flow = driven.add(*lengths(3, 300), push=False)
    driven.push(flow, range(128))
    first = driven.batch()
    driven.push(flow, range(128, 256))
    driven.push(flow, range(256, 300))
    rows = [row for batch in [first, *driven.drain()] for _, rows in batch for row in rows]
    assert sorted(rows) == list(range(300))


# Texts that leave


def test_late_texts_are_returned_and_never_in_a_batch():
    driven = Driven()
    late, late_bulk = driven.add(9, deadline=1.0), driven.add(*[9] * 300, deadline=1.0)
    fine = driven.add(9, deadline=9.0)
    driven.now = 2.0
    assert [flow for batch in driven.drain() for flow, _ in batch] == [fine]
    assert set(driven.expired) == {late, late_bulk}


def test_removed_texts_are_never_in_a_batch():
    driven = Driven()
    gone, fine = driven.add(9, 9), driven.add(9)
    driven.queue.remove(gone)
    assert [flow for batch in driven.drain() for flow, _ in batch] == [fine]


def test_a_withdrawn_text_is_never_in_a_batch():
    driven = Driven()
    flow = driven.add(9, 5, 7)
    driven.queue.withdraw(flow, 1)
    driven.queue.withdraw(flow, 1)
    assert flow.tokens == 16
    assert sorted(row for batch in driven.drain() for _, rows in batch for row in rows) == [0, 2]
