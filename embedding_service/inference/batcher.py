"""The batcher: requests gather into the next batch while a thread for each lane runs the last one."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from embedding_service.engine import EmbedRequest
from embedding_service.errors import DeadlineExceeded, ModelFailure, ServiceError, Unavailable
from embedding_service.inference.execution import Computed, execute
from embedding_service.inference.job import Job, Outcome, Part, Piece, Receiver, lengths_of, normalize
from embedding_service.inference.model import Model
from embedding_service.inference.runtime import DeviceLost, Lane
from embedding_service.inference.schedule import Schedule
from embedding_service.inference.tokenization import Tokenization
from embedding_service.observability import metrics

log = logging.getLogger(__name__)


class Batcher:
    """The threads around a Schedule, and its lock. Every method is safe from any thread."""

    def __init__(
        self,
        model: Model,
        *,
        max_queued_tokens: int,
        cache_bytes: int = 0,
        on_device_lost: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._model = model
        self._on_device_lost = on_device_lost
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._schedule = Schedule(model, max_queued_tokens=max_queued_tokens, cache_bytes=cache_bytes)
        self._closed: str | None = None
        # When each lane began its current batch.
        self._running: dict[int, float] = {}
        self._tokenization = Tokenization(
            model,
            is_idle=lambda: not self._running,
            on_tokenized=self._enqueue,
            on_failed=lambda job, error: self._fail([(job, error)]),
        )
        for number, lane in enumerate(model.lanes):
            threading.Thread(
                target=self._run_forever, args=(number, lane), name=f"model-{number}", daemon=True
            ).start()

    @property
    def running_since(self) -> float | None:
        """Start of the batch that has been running longest, on the monotonic clock."""
        return min(list(self._running.values()), default=None)

    @property
    def queued_tokens(self) -> int:
        """Tokens accepted and not yet answered."""
        return self._schedule.queued_tokens

    def submit(self, request: EmbedRequest, on_done: Callable[[Outcome], None]) -> Job:
        """Queue a request; `on_done` is called once with its outcome, from any thread, even this one.

        Raises InvalidRequest, Overloaded, DeadlineExceeded or Unavailable if it is not accepted.
        """
        with self._lock:
            job = self._accept(request, lambda outcomes: on_done(outcomes[0][1]), 0, time.monotonic())
        self._dispatch([job])
        return job

    def submit_all(self, calls: Sequence[tuple[int, EmbedRequest]], receiver: Receiver) -> None:
        """Queue numbered requests that came together; `receiver` gets the outcome of each, once."""
        now = time.monotonic()
        jobs: list[Job] = []
        refused: list[tuple[int, Outcome]] = []
        with self._lock:
            for number, request in calls:
                try:
                    jobs.append(self._accept(request, receiver, number, now))
                except ServiceError as error:
                    refused.append((number, error))
                except Exception:
                    log.exception("A request could not be queued")
                    refused.append((number, ModelFailure("the service failed on this request")))
        self._dispatch(jobs)
        if refused:
            _hand_over(receiver, refused)

    def cancel(self, job: Job) -> None:
        """Drop a job whose outcome is not needed; its receiver is not called."""
        with self._lock:
            self._schedule.end(job, dropped=True)

    def cancel_all(self, receiver: Receiver) -> None:
        """Drop all jobs of a receiver that is gone."""
        with self._lock:
            for job in self._schedule.jobs(receiver):
                self._schedule.end(job, dropped=True)

    def close(self, reason: str) -> None:
        """Refuse new requests, fail the waiting ones with Unavailable, and end the threads."""
        with self._lock:
            self._closed = reason
            jobs = self._schedule.jobs()
            self._work.notify_all()
        self._fail([(job, Unavailable(reason, retry_after_seconds=1)) for job in jobs])
        self._tokenization.close()

    # Into the queue

    def _accept(self, request: EmbedRequest, receiver: Receiver, number: int, now: float) -> Job:
        if self._closed is not None:
            raise Unavailable(self._closed, retry_after_seconds=1)
        return self._schedule.accept(request, receiver, number, now)

    def _dispatch(self, jobs: list[Job]) -> None:
        """Tokenize new jobs, and answer those that the cache answers entirely."""
        if not all(job.texts for job in jobs):
            with self._lock:
                answered = [job for job in jobs if not job.texts and self._schedule.end(job)]
            self._complete(answered)
            jobs = [job for job in jobs if job.texts]
        self._tokenization.add(jobs)

    def _enqueue(self, pieces: list[tuple[Job, Piece]], seconds: float) -> None:
        broken: list[Job] = []
        with self._lock:
            for job, piece in pieces:
                job.tokenization_seconds += seconds
                try:
                    if not job.finished:
                        self._schedule.enqueue(job, piece)
                except Exception:
                    log.exception("Texts could not be queued")
                    # Ended at once, so that no other job shares its texts, which may not be queued.
                    self._schedule.end(job, dropped=True)
                    broken.append(job)
            self._work.notify()
        for job in broken:
            error = ModelFailure("the service failed on this request")
            _hand_over(job.receiver, [(job.number, error)])

    # Through the lanes

    def _run_forever(self, number: int, lane: Lane) -> None:
        """A lane's thread; it ends if the batcher closes, the device is lost, or its own code is faulty."""
        try:
            while (found := self._next_batch(number)) is not None:
                parts, expired, alone = found
                if expired:
                    late = DeadlineExceeded("the deadline passed in the queue")
                    self._fail([(job, late) for job in expired])
                self._run(parts, number, (self._model.whole if alone else None) or lane)
        except DeviceLost as error:
            self._lose(str(error))
        except BaseException:
            log.critical("The batcher failed", exc_info=True)
            self._lose("the batcher failed")

    def _next_batch(self, number: int) -> tuple[list[Part], list[Job], bool] | None:
        """Wait for work and take a batch; None once the batcher is closed.

        Also returns the jobs whose deadline has passed, and whether nothing else is running or waiting.
        """
        schedule = self._schedule
        with self._lock:
            while not schedule:
                if self._closed is not None:
                    return None
                self._work.wait()
            now = time.monotonic()
            idle = not self._running
            parts, expired = schedule.take(now, idle=idle)
            if schedule:
                self._work.notify()
            self._running[number] = now
            return parts, expired, idle and not schedule

    def _run(self, parts: list[Part], number: int, lane: Lane) -> None:
        """Embed a batch. Raises DeviceLost; any other fault of ours fails the jobs in the batch."""

        def started(began: float) -> None:
            self._running[number] = began

        try:
            for result in execute(parts, self._model, lane, on_start=started, on_out_of_memory=self._lower):
                if isinstance(result, Computed):
                    self._deliver(result, lane)
                else:
                    self._fail_part(result.part, result.why)
        except DeviceLost:
            raise
        except Exception:
            log.exception("A batch failed outside the model")
            for part in parts:
                self._fail_part(part, None)
        finally:
            with self._lock:
                del self._running[number]

    def _lower(self) -> None:
        with self._lock:
            self._schedule.lower(time.monotonic())

    def _lose(self, reason: str) -> None:
        self._on_device_lost(reason)
        self.close(reason)

    # To the receivers

    def _deliver(self, computed: Computed, lane: Lane) -> None:
        vectors, began, ended = computed.vectors, computed.began, computed.ended
        unit = vectors if self._model.normalized else normalize(vectors)
        lengths = lengths_of(computed.slices)
        tokens, padded = sum(lengths), max(lengths) * len(lengths)
        done: list[Job] = []
        try:
            with self._lock:
                self._schedule.measure(tokens, padded, began, ended, whole=lane is self._model.whole)
                first = 0
                for part in computed.batch:
                    last = first + len(part.rows)
                    done += self._schedule.deliver(part, vectors[first:last], unit[first:last], began, ended)
                    first = last
        finally:
            self._complete(done)
        metrics.record_batch(len(lengths), tokens, padded, ended - began)

    def _fail_part(self, part: Part, why: str | None) -> None:
        """Fail all jobs that wait for a part: for a reason, with the text's index, or by a fault of ours."""
        with self._lock:
            takers = self._schedule.give_up_on(part)
        if why is None:
            error = ModelFailure("the service failed on this request")
            self._fail([(job, error) for job, _ in takers])
        else:
            self._fail([(job, ModelFailure(why, index=job.index_of(row))) for job, row in takers])

    def _fail(self, failures: Sequence[tuple[Job, ServiceError]]) -> None:
        with self._lock:
            failures = [(job, error) for job, error in failures if self._schedule.end(job, dropped=True)]
        for job, error in failures:
            _hand_over(job.receiver, [(job.number, error)])

    def _complete(self, jobs: list[Job]) -> None:
        """Hand over the answers of jobs that came out of one batch: those of a receiver together."""
        outcomes: dict[Receiver, list[tuple[int, Outcome]]] = {}
        for job in jobs:
            try:
                outcome: Outcome = job.outcome(self._model.normalized)
            except Exception:
                log.exception("An answer could not be made")
                outcome = ModelFailure("the service failed on this request")
            outcomes.setdefault(job.receiver, []).append((job.number, outcome))
        for receiver, together in outcomes.items():
            _hand_over(receiver, together)


def _hand_over(receiver: Receiver, outcomes: Sequence[tuple[int, Outcome]]) -> None:
    try:
        receiver(outcomes)
    except Exception:
        log.exception("Outcomes could not be handed over")
