"""Requests from acceptance to their vectors, and the running of a batch, step by step without threads."""

from collections.abc import Sequence

import numpy as np
import pytest

from embedding_service.engine import Vectors
from embedding_service.inference.execution import Computed, execute, recompute
from embedding_service.inference.pending import PendingRequest, Share, rows_of
from embedding_service.inference.runtime import DeviceLost, OutOfMemory
from embedding_service.inference.scheduler import LOWERED_SECONDS, Scheduler
from embedding_service.inference.tokenization import tokenize_part, tokenize_together
from tests.inference.fake_runtime import FakeRuntime, Text, request, text, vector_of, vectors_of


class Driven:
    """A scheduler with a clock that the test sets."""

    def __init__(self, model: FakeRuntime) -> None:
        self.model = model
        self.scheduler = Scheduler(model, max_queued_tokens=100_000, cache_bytes=0)
        self.now = 0.0

    def add(self, *texts: str, **fields) -> PendingRequest:
        """Accept a request and queue its texts."""
        pending = self.scheduler.read(request(texts, **fields), print, 0, self.now)
        tokenized = self.model.prepare(pending.distinct.texts, None, None)
        pending.attach(tokenized, 0, int(tokenized.lengths.sum()))
        self.scheduler.accept(pending, self.now)
        return pending

    def take(self) -> list[Share]:
        shares, tokens, late = self.scheduler.take(self.now)
        assert not late
        assert tokens == sum(int(part.lengths.sum()) for part in rows_of(shares))
        return shares


def test_a_request_is_done_with_its_last_vector():
    driven = Driven(FakeRuntime(max_batch_tokens=20))
    pending = driven.add(text(10, "a"), text(10, "b"), text(10, "c"))
    assert driven.scheduler.requests == (1, 0)
    first, second = driven.take(), driven.take()
    assert driven.scheduler.requests == (0, 1)
    assert not driven.scheduler.queue
    assert driven.scheduler.deliver(first, np.ones((2, 8)), np.ones((2, 8)), 0, 1) == []
    assert driven.scheduler.deliver(second, np.ones((1, 8)), np.ones((1, 8)), 0, 1) == [pending]
    assert driven.scheduler.queued_tokens == 0
    assert driven.scheduler.pending() == []
    assert not driven.scheduler.end(pending)


def test_requests_that_were_tokenized_together_are_one_part_of_a_batch():
    model = FakeRuntime()
    driven = Driven(model)
    made = [driven.scheduler.read(request([text(5, n), text(6, n)]), print, n, 0.0) for n in range(3)]
    ready, failed = tokenize_together(model, made)
    assert (ready, failed) == (made, [])
    for pending in made:
        driven.scheduler.accept(pending, 0.0)
    (rows,) = rows_of(driven.take())
    assert sorted(rows.lengths.tolist()) == [5, 5, 5, 6, 6, 6]


def test_a_request_in_parts_is_queued_part_by_part_and_answered_in_order():
    model = FakeRuntime(max_batch_tokens=64)
    driven = Driven(model)
    texts = [text(n % 9 + 2, n) for n in range(400)]
    pending = driven.scheduler.read(request(texts, normalize=False), print, 0, 0.0)
    driven.scheduler.accept(pending, 0.0)
    while pending.arrived < len(texts):
        driven.scheduler.extend(pending, tokenize_part(model, pending, idle=False))
        # Batches in flight refer to what was there before.
        in_flight = driven.take()
        pending.arrived < len(texts) and driven.scheduler.extend(
            pending, tokenize_part(model, pending, idle=False)
        )
        finish(driven, in_flight)
    while driven.scheduler.queue:
        finish(driven, driven.take())
    answer = pending.outcome(model)
    assert np.array_equal(answer.vectors, np.stack([vector_of(one) for one in texts]))
    assert answer.tokens == sum(n % 9 + 2 for n in range(400))


def finish(driven: Driven, shares: list[Share]) -> None:
    vectors = vectors_of(rows_of(shares))
    driven.scheduler.deliver(shares, vectors, vectors, 0.0, 1.0)


def test_batches_are_halved_for_a_while_after_running_out_of_memory():
    driven = Driven(FakeRuntime(max_batch_tokens=256, max_seq_length=32))
    driven.add(*[text(32, number) for number in range(24)])
    driven.scheduler.lower(driven.now)
    assert sum(len(rows) for _, rows in driven.take()) == 4
    driven.now += LOWERED_SECONDS + 1
    assert sum(len(rows) for _, rows in driven.take()) == 8


def run(model: FakeRuntime, *texts: str) -> tuple[list[Computed], list[str]]:
    """The results for a batch of these texts, and what `execute` reported meanwhile."""
    driven = Driven(model)
    driven.add(*texts)
    reports: list[str] = []
    results = execute(
        driven.take(),
        model,
        model.streams[0],
        on_start=lambda _began: reports.append("start"),
        on_out_of_memory=lambda: reports.append("out of memory"),
    )
    return list(results), reports


def test_a_faulty_text_is_isolated_by_halving():
    def fail(batch: Sequence[Text]) -> None:
        if any("bad" in one.text for one in batch):
            raise ValueError("injected")

    results, _ = run(FakeRuntime(on_forward=fail), *[text(5, name) for name in ("a", "bad", "c", "d")])
    (((_, rows), why),) = [failure for one in results for failure in one.failed]
    assert (rows.tolist(), why) == ([1], "could not be embedded")
    computed = [one for one in results if not one.failed]
    assert sorted(row for one in computed for _, rows in one.shares for row in rows.tolist()) == [0, 2, 3]


def test_running_out_of_memory_is_reported_each_time():
    def fail(batch: Sequence[Text]) -> None:
        if len(batch) > 1:
            raise OutOfMemory

    results, reports = run(FakeRuntime(on_forward=fail), text(5, "a"), text(5, "b"))
    assert reports == ["start", "out of memory", "start", "start"]
    assert not any(one.failed for one in results)


def test_texts_whose_vectors_are_not_finite_are_set_apart():
    def spoil(batch: Sequence[Text]) -> Vectors:
        vectors = np.stack([vector_of(one.text) for one in batch])
        vectors[[one.text == text(5, "b") for one in batch], 1] = np.inf
        return vectors

    model = FakeRuntime(on_forward=spoil)
    ((computed,), _) = run(model, *[text(5, name) for name in "abc"])
    (pending, rows), (again, (spoiled,)) = *computed.shares, *computed.spoiled
    assert (again, spoiled, computed.texts, computed.tokens) == (pending, 1, 3, 15)
    expected = [vector_of(pending.texts[row]) for row in rows.tolist()]
    assert np.array_equal(computed.vectors, expected)
    one = recompute(computed.spoiled[0], model)
    assert np.array_equal(one.vectors, [vector_of(text(5, "b"))])


def test_a_lost_device_ends_the_run():
    def lose(_batch: Sequence[Text]) -> None:
        raise DeviceLost

    with pytest.raises(DeviceLost):
        run(FakeRuntime(on_forward=lose), text(5, "a"), text(5, "b"))
