"""The batcher: the threads around the scheduler. Requests gather into the next batch while others run."""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from embedding_service.engine import EmbedRequest, Outcome, Receiver, Vectors
from embedding_service.errors import DeadlineExceeded, ModelFailure, ServiceError, Unavailable
from embedding_service.inference.execution import Computed, execute, recompute
from embedding_service.inference.model import Model
from embedding_service.inference.pending import PendingRequest, Share, normalize
from embedding_service.inference.runtime import DeviceLost, Stream
from embedding_service.inference.scheduler import Scheduler
from embedding_service.inference.tokenization import (
    SMALL_CHARACTERS,
    SMALL_TEXTS,
    cut_next,
    tokenize_part,
    tokenize_together,
)
from embedding_service.inference.tokenized import IntArray
from embedding_service.observability import metrics

log = logging.getLogger(__name__)

# Streams with a core of their own leave it to what feeds them: tokenizing, and the web workers.
NICENESS = 10

Failure = tuple[PendingRequest, ServiceError]
Ended = tuple[PendingRequest, ServiceError | None]
# A batch, its tokens, and the requests whose deadline has passed.
Turn = tuple[list[Share], int, list[PendingRequest]]


class Batcher:
    """The threads around a Scheduler, and its lock. Every method is safe from any thread."""

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
        self._scheduler = Scheduler(model, max_queued_tokens=max_queued_tokens, cache_bytes=cache_bytes)
        # Reading a request touches nothing that threads share, except the cache.
        self._reading = self._lock if cache_bytes else contextlib.nullcontext()
        self._closed: str | None = None
        # When each stream, or what computes again, began its current batch.
        self._running: dict[Stream | ThreadPoolExecutor, float] = {}
        # The streams that sleep, with the lock that wakes each; the one that ran last comes last.
        self._sleeping: dict[Stream, threading.Lock] = {}
        # A thread each: a request that is cut delays no other that is tokenized.
        self._to_cut: queue.SimpleQueue[PendingRequest | None] = queue.SimpleQueue()
        self._large: queue.SimpleQueue[PendingRequest | None] = queue.SimpleQueue()
        for waiting, step in ((self._to_cut, self._cut), (self._large, self._tokenize)):
            self._start(self._step_forever, waiting, step, name=step.__name__.strip("_"))
        # Computing again may load the model in torch first, for which no stream waits.
        self._again = ThreadPoolExecutor(1, "again")
        # Each is released to wake its stream.
        self._woken: dict[Stream, threading.Lock] = {}
        for number, stream in enumerate([*model.streams, *([model.all_cores] if model.all_cores else [])]):
            self._woken[stream] = threading.Lock()
            self._woken[stream].acquire()
            self._start(self._run_forever, stream, name=f"model-{number}")

    @property
    def running_since(self) -> float | None:
        """Start of the batch that has been running longest, on the monotonic clock."""
        return min(list(self._running.values()), default=None)

    @property
    def queued_tokens(self) -> int:
        """Tokens accepted and not yet answered."""
        return self._scheduler.queued_tokens

    @property
    def requests(self) -> tuple[int, int]:
        """How many requests wait for their first batch, and how many have begun."""
        return self._scheduler.requests

    def submit(
        self, calls: Sequence[tuple[int, EmbedRequest]], receiver: Receiver, *, may_run: bool = False
    ) -> None:
        """Queue numbered requests that came together.

        `receiver` gets the outcome of each once, from any thread, even this one. If this thread `may_run` a
        batch, it computes a single text itself while nothing else runs: waking a stream would take longer.
        """
        now = time.monotonic()
        small: dict[Hashable, list[PendingRequest]] = {}
        ready: list[PendingRequest] = []
        done: list[PendingRequest] = []
        outcomes: list[tuple[int, Outcome]] = []
        with self._reading:
            for number, request in calls:
                try:
                    pending = self._scheduler.read(request, receiver, number, now)
                except Exception as error:
                    outcomes.append((number, _reported(error)))
                    continue
                if pending.chunks is not None or (
                    len(pending.distinct.texts) > SMALL_TEXTS or pending.characters > SMALL_CHARACTERS
                ):
                    ready.append(pending)
                elif not pending.missing:
                    done.append(pending)
                else:
                    small.setdefault(pending.context, []).append(pending)
        for together in small.values():
            worth = self._worth_tokenizing(together, outcomes, now) if self._scheduler.busy else together
            fine, failed = tokenize_together(self._model, worth) if worth else ([], [])
            for pending in fine:
                (ready if pending.missing else done).append(pending)
            outcomes += [(one.number, error) for one, error in failed]
        turn: Turn | None = None
        all_cores = self._model.all_cores
        if ready:
            with self._lock:
                outcomes += [(one.number, error) for one, error in self._accept(ready, now)]
                # Its own thread goes on sleeping.
                alone = may_run and len(calls) == 1 and len(calls[0][1].texts) == 1
                if alone and all_cores in self._sleeping and self._suits(all_cores):
                    del self._sleeping[all_cores]
                    turn = self._take(all_cores)
                self._wake()
        outcomes += [(one.number, self._outcome(one)) for one in done]
        if outcomes:
            _hand_over(receiver, outcomes)
        if turn is not None and all_cores is not None:
            try:
                self._run(*turn, all_cores, goes_on=False)
            except BaseException as error:
                self._break(error)

    def cancel(self, receiver: Receiver) -> None:
        """Drop the requests of a receiver that is gone; it is not called again."""
        with self._lock:
            for pending in self._scheduler.pending(receiver):
                self._scheduler.end(pending)

    def close(self, reason: str) -> None:
        """Refuse new requests, fail the waiting ones with Unavailable, and end the threads."""
        with self._lock:
            self._closed = reason
            waiting = self._scheduler.pending()
            while self._sleeping:
                self._sleeping.popitem()[1].release()
        self._to_cut.put(None)
        self._large.put(None)
        self._again.shutdown(wait=False, cancel_futures=True)
        self._fail((one, Unavailable(reason, retry_after_seconds=1)) for one in waiting)

    @staticmethod
    def _start(run: Callable[..., None], *arguments: Any, name: str) -> None:
        threading.Thread(target=run, args=arguments, name=name, daemon=True).start()

    # Into the queue

    def _worth_tokenizing(
        self, together: list[PendingRequest], outcomes: list[tuple[int, Outcome]], now: float
    ) -> list[PendingRequest]:
        """Refuse by their size, before they are tokenized, requests that a loaded service cannot take."""
        worth = []
        with self._lock:
            for pending in together:
                try:
                    self._scheduler.check(pending, now)
                    worth.append(pending)
                except ServiceError as error:
                    outcomes.append((pending.number, error))
        return worth

    def _accept(self, ready: list[PendingRequest], now: float) -> list[Failure]:
        """Queue requests, or let them be cut; returns those that are refused. Needs the lock."""
        refused: list[Failure] = []
        for pending in ready:
            try:
                if self._closed is not None:
                    raise Unavailable(self._closed, retry_after_seconds=1)
                if not pending.missing:
                    self._scheduler.hold(pending)
                    self._to_cut.put(pending)
                    continue
                self._scheduler.accept(pending, now)
                if pending.tokenized is None:
                    self._large.put(pending)
            except Exception as error:
                self._scheduler.end(pending)
                refused.append((pending, _reported(error)))
        return refused

    def _step_forever(
        self, waiting: queue.SimpleQueue[PendingRequest | None], step: Callable[[PendingRequest], bool]
    ) -> None:
        """Take the next step of one request after another, in turn, until the batcher closes."""
        while (pending := waiting.get()) is not None:
            if pending.finished:
                continue
            try:
                if step(pending):
                    waiting.put(pending)
            except Exception as error:
                self._fail([(pending, _reported(error))])

    def _cut(self, pending: PendingRequest) -> bool:
        """Cut the next texts of a request; whether there are more. Its pieces are queued like texts."""
        pieces = cut_next(self._model, pending)
        if pieces is None:
            return True
        refused: list[Failure] = []
        with self._lock:
            if not pending.finished:
                self._scheduler.look_up(pending, pieces)
                if pending.missing:
                    refused = self._accept([pending], time.monotonic())
                    self._wake()
        self._answer(refused)
        self._finish(pending)
        return False

    def _tokenize(self, pending: PendingRequest) -> bool:
        """Tokenize the next part of a large request; whether there are more."""
        part = tokenize_part(self._model, pending, idle=not self._running)
        with self._lock:
            if not pending.finished:
                self._scheduler.extend(pending, part)
                self._wake()
        self._finish(pending)
        return pending.arrived < len(pending.distinct.texts)

    # Through the streams

    def _run_forever(self, stream: Stream) -> None:
        """A stream's thread; ends if the batcher closes, the device is lost, or its own code is faulty."""
        if self._model.all_cores is not None and stream is not self._model.all_cores:
            _be_nice()
        woken = self._woken[stream]
        try:
            with self._lock:
                turn = self._take(stream)
            while self._closed is None:
                if turn is None:
                    woken.acquire()
                    with self._lock:
                        turn = self._take(stream)
                else:
                    turn = self._run(*turn, stream)
        except BaseException as error:
            self._break(error)

    def _take(self, stream: Stream, *, goes_on: bool = True) -> Turn | None:
        """Take a batch, or None: then the stream sleeps until it is woken. Needs the lock."""
        turn: Turn | None = None
        if self._closed is not None:
            if not goes_on:
                self._woken[stream].release()
            return None
        if goes_on and self._scheduler.queue and self._suits(stream):
            now = time.monotonic()
            turn = self._scheduler.take(now)
            self._running[stream] = now
        else:
            self._sleeping[stream] = self._woken[stream]
        self._wake()
        return turn

    def _suits(self, stream: Stream) -> bool:
        """Whether a stream should take a batch: the one with all cores only one that is alone."""
        return stream is not self._model.all_cores or (not self._running and self._scheduler.fits_one_batch)

    def _wake(self) -> None:
        """Wake a stream if texts wait: of those that suit, the one that ran last. Needs the lock."""
        if not self._sleeping or not self._scheduler.queue:
            return
        all_cores = self._model.all_cores
        if all_cores in self._sleeping and self._suits(all_cores):
            self._sleeping.pop(all_cores).release()
            return
        for stream in reversed(self._sleeping):
            if stream is not all_cores:
                self._sleeping.pop(stream).release()
                return

    def _run(
        self,
        shares: list[Share],
        tokens: int,
        late: list[PendingRequest],
        stream: Stream,
        *,
        goes_on: bool = True,
    ) -> Turn | None:
        """Embed a batch, and take the next one if the stream goes on, which otherwise sleeps.

        Raises DeviceLost; another fault of ours fails the batch.
        """
        if late:
            too_late = DeadlineExceeded("the deadline passed in the queue")
            self._fail((pending, too_late) for pending in late)
        ended: list[Ended] = []
        computed: list[Computed] = []
        fault: Exception | None = None
        try:
            started = partial(self._running.__setitem__, stream)
            computed = execute(shares, self._model, stream, on_start=started, on_out_of_memory=self._lower)
            units = [one.vectors if self._model.normalized else normalize(one.vectors) for one in computed]
        except DeviceLost:
            raise
        except Exception as error:
            fault = error
        with self._lock:
            self._running.pop(stream, None)
            self._scheduler.ran(tokens)
            try:
                if fault is not None:
                    raise fault
                for one, unit in zip(computed, units, strict=True):
                    if not one.failed and stream is not self._model.all_cores:
                        self._scheduler.measure(one.padded, one.began, one.ended)
                    ended += self._deliver(one, unit)
            except Exception as error:
                reported = _reported(error)
                ended += [(pending, reported) for pending, _ in shares if self._scheduler.end(pending)]
            following = self._take(stream, goes_on=goes_on)
        self._answer(ended)
        for one in computed:
            if not one.failed:
                metrics.record_batch(one.texts, one.tokens, one.padded, one.ended - one.began)
        return following

    def _recompute(self, pending: PendingRequest, row: IntArray) -> None:
        """Compute a text of a request again; only that request waits for it."""
        try:
            if time.monotonic() > pending.request.deadline:
                raise DeadlineExceeded("the deadline passed in the queue")
            if not pending.finished:
                self._running[self._again] = time.monotonic()
                one = recompute((pending, row), self._model)
                unit = one.vectors if self._model.normalized else normalize(one.vectors)
                with self._lock:
                    ended = list(self._deliver(one, unit))
                self._answer(ended)
        except DeviceLost as error:
            self._break(error)
        except Exception as error:
            self._fail([(pending, _reported(error))])
        finally:
            self._running.pop(self._again, None)

    def _lower(self) -> None:
        with self._lock:
            self._scheduler.lower(time.monotonic())

    def _break(self, error: BaseException) -> None:
        """The device is lost, or the batcher's own code is faulty."""
        if not isinstance(error, DeviceLost):
            log.critical("The batcher failed", exc_info=error)
        self._lose(str(error) if isinstance(error, DeviceLost) else "the batcher failed")

    def _lose(self, reason: str) -> None:
        self._on_device_lost(reason)
        self.close(reason)

    # To the receivers

    def _deliver(self, computed: Computed, unit: Vectors) -> Iterator[Ended]:
        """Give the requests their vectors; yields those that have ended, with their error. Needs the lock."""
        if self._closed is None:
            for pending, rows in computed.spoiled:
                for at in range(len(rows)):
                    self._again.submit(self._recompute, pending, rows[at : at + 1])
        for (pending, rows), why in computed.failed:
            try:
                pending.refuse_row(int(rows[0]) - pending.first, ModelFailure(why))
            except ServiceError as error:
                if self._scheduler.end(pending):
                    yield pending, error
        for pending in self._scheduler.deliver(
            computed.shares, computed.vectors, unit, computed.began, computed.ended
        ):
            yield pending, None

    def _answer(self, ended: Iterable[Ended]) -> None:
        outcomes: dict[Receiver, list[tuple[int, Outcome]]] = {}
        for pending, failure in ended:
            outcome = failure or self._outcome(pending)
            outcomes.setdefault(pending.receiver, []).append((pending.number, outcome))
        for receiver, together in outcomes.items():
            _hand_over(receiver, together)

    def _finish(self, pending: PendingRequest) -> None:
        """Answer a request if there is nothing left to compute for it."""
        with self._lock:
            whole = pending.arrived == len(pending.distinct.texts)
            if pending.missing or not whole or not self._scheduler.end(pending):
                return
        self._answer([(pending, None)])

    def _outcome(self, pending: PendingRequest) -> Outcome:
        try:
            return pending.outcome(self._model)
        except Exception as error:
            return _reported(error)

    def _fail(self, failures: Iterable[Failure]) -> None:
        with self._lock:
            ended = [(one, error) for one, error in failures if self._scheduler.end(one)]
        self._answer(ended)


def _reported(error: Exception) -> ServiceError:
    """What the caller hears of an error: our own, or a fault, which the log explains."""
    if isinstance(error, ServiceError):
        return error
    log.error("A request failed outside the model", exc_info=error)
    return ModelFailure("the service failed on this request")


def _hand_over(receiver: Receiver, outcomes: Sequence[tuple[int, Outcome]]) -> None:
    try:
        receiver(outcomes)
    except Exception:
        log.exception("Outcomes could not be handed over")


def _be_nice() -> None:
    """On Linux a niceness is a thread's own."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
