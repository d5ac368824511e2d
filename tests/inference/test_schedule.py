"""Jobs from acceptance to their vectors, and the running of a batch, driven step by step without threads."""

from collections.abc import Sequence

import numpy as np
import pytest

from embedding_service.engine import Vectors
from embedding_service.inference.execution import Computed, Failed, execute
from embedding_service.inference.job import Job, Part, Piece
from embedding_service.inference.runtime import DeviceLost, OutOfMemory
from embedding_service.inference.schedule import LOWERED_SECONDS, Schedule
from tests.inference.fake_runtime import FakeRuntime, Text, request, text, vector_of


class Driven:
    """A schedule with a clock that the test sets."""

    def __init__(self, runtime: FakeRuntime, cache_bytes: int = 0) -> None:
        self.runtime = runtime
        self.schedule = Schedule(runtime, max_queued_tokens=100_000, cache_bytes=cache_bytes)
        self.now = 0.0

    def add(self, *texts: str, **fields) -> Job:
        """Accept a request and queue its texts."""
        job = self.schedule.accept(request(texts, **fields), print, 0, self.now)
        if job.texts:
            prepared = self.runtime.prepare(job.texts, None, None)
            self.schedule.enqueue(job, Piece(0, len(job.texts), prepared, 0))
        return job

    def take(self) -> list[Part]:
        parts, expired = self.schedule.take(self.now, idle=True)
        assert not expired
        return parts

    def deliver(self, parts: Sequence[Part]) -> list[Job]:
        """Give each part its vectors; returns the jobs that are done."""
        done = []
        for part in parts:
            vectors = np.stack([vector_of(part.job.texts[row]) for row in part.rows.tolist()])
            done += self.schedule.deliver(part, vectors, vectors, self.now, self.now + 1)
        return done


def test_a_job_is_done_with_its_last_vector():
    driven = Driven(FakeRuntime(max_batch_tokens=20))
    job = driven.add(text(10, "a"), text(10, "b"), text(10, "c"))
    first, second = driven.take(), driven.take()
    assert not driven.schedule
    assert driven.deliver(first) == []
    assert driven.deliver(second) == [job]
    assert driven.schedule.queued_tokens == 0
    assert driven.schedule.jobs() == []


def test_a_text_that_two_jobs_share_is_taken_once_and_finishes_both():
    driven = Driven(FakeRuntime())
    jobs = [driven.add(text(10, "same")) for _ in range(2)]
    parts = driven.take()
    assert [part.rows.tolist() for part in parts] == [[0]]
    assert driven.deliver(parts) == jobs


def test_a_part_is_given_up_for_all_that_wait_for_it():
    driven = Driven(FakeRuntime())
    jobs = [driven.add(text(10, "same")) for _ in range(2)]
    (part,) = driven.take()
    assert driven.schedule.give_up_on(part) == [(job, 0) for job in jobs]
    driven.add(text(10, "same"))
    assert driven.take()[0].job not in jobs


def test_a_job_that_the_cache_answers_has_no_texts_left():
    driven = Driven(FakeRuntime(), cache_bytes=1 << 20)
    driven.add(text(10, "a"))
    driven.deliver(driven.take())
    job = driven.add(text(10, "a"))
    assert (job.texts, job.hits) == ([], 1)
    assert driven.schedule.end(job)
    assert not driven.schedule.end(job)


def test_batches_are_halved_for_a_while_after_running_out_of_memory():
    driven = Driven(FakeRuntime(max_batch_tokens=256, max_seq_length=32))
    driven.add(*[text(32, number) for number in range(24)])
    driven.schedule.lower(driven.now)
    assert sum(len(part.rows) for part in driven.take()) == 4
    driven.now += LOWERED_SECONDS + 1
    assert sum(len(part.rows) for part in driven.take()) == 8


def run(runtime: FakeRuntime, *texts: str) -> tuple[list[Computed | Failed], list[str]]:
    """The results for a batch of these texts, and what `execute` reported meanwhile."""
    driven = Driven(runtime)
    driven.add(*texts)
    reports: list[str] = []
    results = execute(
        driven.take(),
        runtime,
        runtime.lanes[0],
        on_start=lambda _began: reports.append("start"),
        on_out_of_memory=lambda: reports.append("out of memory"),
    )
    return list(results), reports


def test_a_faulty_text_is_isolated_by_halving():
    def fail(batch: Sequence[Text]) -> None:
        if any("bad" in one.text for one in batch):
            raise ValueError("injected")

    results, _ = run(FakeRuntime(on_forward=fail), *[text(5, name) for name in ("a", "bad", "c", "d")])
    (failed,) = [one for one in results if isinstance(one, Failed)]
    assert (failed.part.rows.tolist(), failed.why) == ([1], "could not be embedded")
    computed = [one for one in results if isinstance(one, Computed)]
    assert sorted(row for one in computed for part in one.batch for row in part.rows.tolist()) == [0, 2, 3]


def test_running_out_of_memory_is_reported_each_time():
    def fail(batch: Sequence[Text]) -> None:
        if len(batch) > 1:
            raise OutOfMemory

    results, reports = run(FakeRuntime(on_forward=fail), text(5, "a"), text(5, "b"))
    assert reports == ["start", "out of memory", "start", "start"]
    assert all(isinstance(one, Computed) for one in results)


def test_a_vector_that_is_not_finite_is_computed_again():
    def spoil(batch: Sequence[Text]) -> Vectors:
        return np.full((len(batch), 8), np.nan, np.float32)

    ((computed,), _) = run(FakeRuntime(on_forward=spoil), text(5, "a"))
    assert isinstance(computed, Computed)
    assert np.array_equal(computed.vectors[0], vector_of(text(5, "a")))


def test_a_lost_device_ends_the_run():
    def lose(_batch: Sequence[Text]) -> None:
        raise DeviceLost

    with pytest.raises(DeviceLost):
        run(FakeRuntime(on_forward=lose), text(5, "a"), text(5, "b"))
