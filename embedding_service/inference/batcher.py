"""The batcher: the threads around the scheduler. Requests gather into the next batch while others run."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence

from embedding_service.engine import EmbedRequest, Outcome, Receiver
from embedding_service.errors import DeadlineExceeded, ModelFailure, ServiceError, Unavailable
from embedding_service.inference.execution import Computed, execute
from embedding_service.inference.model import Model
from embedding_service.inference.pending import PendingRequest, Share, normalize
from embedding_service.inference.runtime import DeviceLost, Lane
from embedding_service.inference.scheduler import Scheduler
from embedding_service.inference.tokenization import is_large, tokenize_part, tokenize_together
from embedding_service.observability import metrics

log = logging.getLogger(__name__)

# Streams with a core of their own leave it to what feeds them: tokenizing, and the web workers.
NICENESS = 10

Failure = tuple[PendingRequest, ServiceError]


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
        # When each stream began its current batch.
        self._running: dict[Lane, float] = {}
        # The streams that sleep, with the lock that wakes each; the one that ran last comes last.
        self._sleeping: dict[Lane, threading.Lock] = {}
        self._large: deque[PendingRequest] = deque()
        self._large_came = threading.Condition(self._lock)
        threading.Thread(target=self._tokenize_forever, name="tokenizer", daemon=True).start()
        streams = [*model.lanes, *([model.whole] if model.whole else [])]
        for number, stream in enumerate(streams):
            threading.Thread(
                target=self._run_forever, args=(stream,), name=f"model-{number}", daemon=True
            ).start()

    @property
    def running_since(self) -> float | None:
        """Start of the batch that has been running longest, on the monotonic clock."""
        return min(list(self._running.values()), default=None)

    @property
    def queued_tokens(self) -> int:
        """Tokens accepted and not yet answered."""
        return self._scheduler.queued_tokens

    def submit(self, calls: Sequence[tuple[int, EmbedRequest]], receiver: Receiver) -> None:
        """Queue numbered requests that came together.

        `receiver` gets the outcome of each once, from any thread, even this one.
        """
        now = time.monotonic()
        small: dict[Hashable, list[PendingRequest]] = {}
        large: list[PendingRequest] = []
        outcomes: list[tuple[int, Outcome]] = []
        looked_up, hits = 0, 0
        with self._reading:
            for number, request in calls:
                try:
                    pending = self._scheduler.read(request, receiver, number, now)
                except Exception as error:
                    outcomes.append((number, _reported(error)))
                    continue
                if pending.caches:
                    looked_up += len(request.texts)
                    hits += pending.distinct.hits
                if not pending.missing:
                    outcomes.append((number, self._outcome(pending)))
                elif is_large(pending):
                    large.append(pending)
                else:
                    small.setdefault(pending.context, []).append(pending)
        if looked_up:
            metrics.record_cache(hits, looked_up - hits)
        ready = large
        for together in small.values():
            worth = self._worth_tokenizing(together, outcomes, now) if self._scheduler.busy else together
            fine, failed = tokenize_together(self._model, worth) if worth else ([], [])
            ready += fine
            outcomes += [(one.number, error) for one, error in failed]
        if ready:
            with self._lock:
                outcomes += [(one.number, error) for one, error in self._accept(ready, now)]
        if outcomes:
            _hand_over(receiver, outcomes)

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
            self._large_came.notify()
            while self._sleeping:
                self._sleeping.popitem()[1].release()
        self._fail((one, Unavailable(reason, retry_after_seconds=1)) for one in waiting)

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
        """Queue requests; returns those that are refused. The caller holds the lock."""
        refused: list[Failure] = []
        for pending in ready:
            try:
                if self._closed is not None:
                    raise Unavailable(self._closed, retry_after_seconds=1)
                self._scheduler.accept(pending, now)
                if pending.tokenized is None:
                    self._large.append(pending)
                    self._large_came.notify()
            except Exception as error:
                self._scheduler.end(pending)
                refused.append((pending, _reported(error)))
        self._wake()
        return refused

    def _tokenize_forever(self) -> None:
        while True:
            with self._lock:
                while not self._large:
                    if self._closed is not None:
                        return
                    self._large_came.wait()
                pending = self._large.popleft()
            if pending.finished:
                continue
            try:
                part = tokenize_part(self._model, pending, idle=not self._running)
                with self._lock:
                    if not pending.finished:
                        self._scheduler.extend(pending, part)
                        self._wake()
                        if pending.arrived < len(pending.distinct.texts):
                            self._large.append(pending)
            except Exception as error:
                self._fail([(pending, _reported(error))])

    # Through the streams

    def _run_forever(self, stream: Lane) -> None:
        """A stream's thread; ends if the batcher closes, the device is lost, or its own code is faulty."""
        if self._model.whole is not None and stream is not self._model.whole:
            _be_nice()
        try:
            while (taken := self._take(stream)) is not None:
                shares, tokens, late = taken
                if late:
                    error = DeadlineExceeded("the deadline passed in the queue")
                    self._fail((pending, error) for pending in late)
                self._run(shares, tokens, stream)
        except DeviceLost as error:
            self._lose(str(error))
        except BaseException:
            log.critical("The batcher failed", exc_info=True)
            self._lose("the batcher failed")

    def _take(self, stream: Lane) -> tuple[list[Share], int, list[PendingRequest]] | None:
        """Wait for work and take a batch; None once the batcher is closed."""
        asleep: threading.Lock | None = None
        while True:
            with self._lock:
                if self._closed is not None:
                    return None
                if self._scheduler and self._suits(stream):
                    now = time.monotonic()
                    taken = self._scheduler.take(now)
                    self._running[stream] = now
                    self._wake()
                    return taken
                if asleep is None:
                    asleep = threading.Lock()
                    asleep.acquire()
                self._sleeping[stream] = asleep
                self._wake()
            asleep.acquire()

    def _suits(self, stream: Lane) -> bool:
        """Whether a stream should take a batch: the one with all cores only one that is alone."""
        return stream is not self._model.whole or (not self._running and self._scheduler.fits_one_batch)

    def _wake(self) -> None:
        """Wake a stream if texts wait: of those that suit, the one that ran last. Needs the lock."""
        if not self._scheduler or not self._sleeping:
            return
        all_cores = self._model.whole
        if all_cores in self._sleeping and self._suits(all_cores):
            self._sleeping.pop(all_cores).release()
            return
        for stream in reversed(self._sleeping):
            if stream is not all_cores:
                self._sleeping.pop(stream).release()
                return

    def _run(self, shares: list[Share], tokens: int, stream: Lane) -> None:
        """Embed a batch. Raises DeviceLost; any other fault of ours fails the requests in the batch."""

        def started(began: float) -> None:
            self._running[stream] = began

        try:
            for result in execute(
                shares, self._model, stream, on_start=started, on_out_of_memory=self._lower
            ):
                if isinstance(result, Computed):
                    tokens -= result.tokens
                    self._deliver(result, stream)
                else:
                    pending, rows = result.share
                    error = ModelFailure(result.why, index=pending.index_of(int(rows[0])))
                    self._fail([(pending, error)])
        except DeviceLost:
            raise
        except Exception as error:
            reported = _reported(error)
            self._fail((pending, reported) for pending, _ in shares)
        finally:
            # Usually the delivery has done this already.
            if tokens or stream in self._running:
                with self._lock:
                    self._scheduler.ran(tokens)
                    self._running.pop(stream, None)

    def _lower(self) -> None:
        with self._lock:
            self._scheduler.lower(time.monotonic())

    def _lose(self, reason: str) -> None:
        self._on_device_lost(reason)
        self.close(reason)

    # To the receivers

    def _deliver(self, computed: Computed, stream: Lane) -> None:
        vectors, began, ended = computed.vectors, computed.began, computed.ended
        unit = vectors if self._model.normalized else normalize(vectors)
        with self._lock:
            self._running.pop(stream, None)
            self._scheduler.ran(computed.tokens)
            done = self._scheduler.deliver(computed.shares, vectors, unit, began, ended)
            if stream is not self._model.whole:
                self._scheduler.measure(computed.padded, began, ended)
        outcomes: dict[Receiver, list[tuple[int, Outcome]]] = {}
        for pending in done:
            outcomes.setdefault(pending.receiver, []).append((pending.number, self._outcome(pending)))
        for receiver, together in outcomes.items():
            _hand_over(receiver, together)
        metrics.record_batch(len(vectors), computed.tokens, computed.padded, ended - began)

    def _outcome(self, pending: PendingRequest) -> Outcome:
        try:
            return pending.outcome(self._model.normalized)
        except Exception as error:
            return _reported(error)

    def _fail(self, failures: Iterable[Failure]) -> None:
        with self._lock:
            ended = [(one, error) for one, error in failures if self._scheduler.end(one)]
        for pending, error in ended:
            _hand_over(pending.receiver, [(pending.number, error)])


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
