"""The queue and the batcher: one thread a lane of the model; while batches run, the next one gathers."""

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from embedding_service import metrics
from embedding_service.engine import Embeddings, EmbedRequest, Timings, Vectors
from embedding_service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailure,
    Overloaded,
    ServiceError,
    Unavailable,
)
from embedding_service.inference.runtime import DeviceLost, OutOfMemory, Runtime, Tokens

log = logging.getLogger(__name__)

Outcome = Embeddings | ServiceError

# A request of up to this many texts and characters is tokenised by the thread that brings it, which
# saves a thread switch; a larger one by the tokenizer thread in pieces of this size, so that no
# request waits for the tokenisation of another's 2,048 texts.
INLINE_TEXTS, INLINE_CHARACTERS = 16, 16_384
PIECE_TEXTS, PIECE_CHARACTERS = 128, 131_072

# A request with more texts than this is bulk: small ones come first where it is both one's turn. Where
# `separate_bulk` is set, its texts do not share batches with those of small requests, which would wait
# for them and gain nothing; and its batches have a share of the budget while small requests come, which
# wait for those in flight, and for so long after the last one.
BULK_TEXTS = 8
BULK_SHARE, SMALL_AGO_SECONDS = 4, 1.0

# A batch may waste this share of its tokens on padding. Where less waits than the window holds, it may
# waste `free_padding_tokens`, if that is more, since there will be no better company.
PADDING_SHARE = 0.08

# How far beyond one batch the batcher looks for texts of like length.
WINDOW_BATCHES, WINDOW_TEXTS = 4, 1024

# After an out-of-memory the budget is halved for this long.
LOWERED_BUDGET_SECONDS = 60.0

CHARACTERS_PER_TOKEN = 4

# A request is accepted if it should be done within this share of its time: requests share the model
# fairly, so those that wait together end together, and were the reckoning a little off, all too late.
ADMITTED_SHARE = 0.8

# What a batch weighs in the measured rate once another one has run.
RECENT = 0.9


@dataclass(slots=True, eq=False)
class Job:
    """One accepted request on its way. All its fields belong to the batcher's lock or its runner."""

    request: EmbedRequest
    on_done: Callable[[Outcome], None]
    submitted: float
    prompt: str | None
    charge: int
    tag: float = 0.0
    tokenized: int = 0
    remaining: int = 0
    tokens: int = 0
    truncated: list[int] = field(default_factory=list)
    vectors: Vectors | None = None
    finished: bool = False
    tokenization_seconds: float = 0.0
    started: float = 0.0
    inference_seconds: float = 0.0
    inferred_until: float = 0.0

    @property
    def bulk(self) -> bool:
        """Whether it has more texts than a small request."""
        return len(self.request.texts) > BULK_TEXTS


@dataclass(slots=True)
class Item:
    """One text of a job, tokenised."""

    job: Job
    index: int
    tokens: Tokens
    bulk: bool


class Batcher:
    """Turns requests into batches for a Runtime. `submit` is safe from any thread.

    Order is fair queueing by tokens: each request is a flow, a text's tag is the virtual time at
    which its turn comes (start-time fair queueing, Goyal et al. 1996), so a request of 2,048 texts
    shares the model with the others instead of holding it.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_queued_tokens: int,
        on_device_lost: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._runtime = runtime
        self._max_queued_tokens = max_queued_tokens
        self._on_device_lost = on_device_lost
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._untokenized_work = threading.Condition(self._lock)
        # By tag, then small before bulk, then as they came.
        self._heap: list[tuple[float, bool, int, Item]] = []
        self._untokenized: deque[Job] = deque()
        self._jobs: set[Job] = set()
        self._sequence = count()
        self._virtual_time = 0.0
        self._small_until = 0.0
        self._queued_tokens = 0
        self._tokens_per_second = 0.0
        self._recent_tokens = self._recent_seconds = 0.0
        self._budget = runtime.max_batch_tokens
        self._budget_lowered_until = 0.0
        self._closed: str | None = None
        # When each lane began the batch it runs, and when the rate was last reckoned.
        self._running: dict[int, float] = {}
        self._measured = 0.0
        threading.Thread(target=self._tokenize_forever, name="tokenizer", daemon=True).start()
        for lane in range(runtime.lanes):
            threading.Thread(
                target=self._run_forever, args=(lane,), name=f"model-{lane}", daemon=True
            ).start()

    @property
    def running_since(self) -> float | None:
        """When the batch that has been running longest began, on the monotonic clock."""
        return min(list(self._running.values()), default=None)

    @property
    def queued_tokens(self) -> int:
        """Tokens accepted and not yet answered."""
        return self._queued_tokens

    def submit(self, request: EmbedRequest, on_done: Callable[[Outcome], None]) -> Job:
        """Queue a request; `on_done` gets its outcome once, from any thread, also from this one.

        Raises InvalidRequest, Overloaded, DeadlineExceeded or Unavailable where it is not accepted.
        """
        now = time.monotonic()
        texts = len(request.texts)
        if not texts:
            raise InvalidRequest("there is no text to embed")
        prompt = self._runtime.prompt(request.prompt_name, request.input_type)
        characters = sum(map(len, request.texts)) + len(prompt or "") * texts
        estimate = characters // CHARACTERS_PER_TOKEN + 2 * texts
        charge = min(estimate, self._runtime.max_seq_length * texts)
        job = Job(request, on_done, now, prompt, charge, remaining=texts)
        with self._lock:
            self._admit(job, now)
            self._jobs.add(job)
            self._queued_tokens += charge
            job.tag = self._virtual_time
            if not job.bulk:
                self._small_until = now + SMALL_AGO_SECONDS
        if texts <= INLINE_TEXTS and characters <= INLINE_CHARACTERS:
            self._tokenize_piece(job)
        else:
            with self._lock:
                self._untokenized.append(job)
                self._untokenized_work.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Drop a job nobody waits for any more; its `on_done` is not called."""
        with self._lock:
            job.finished = True
            self._forget(job)

    def close(self, reason: str) -> None:
        """Refuse new requests, fail the waiting ones with Unavailable, and end the threads."""
        with self._lock:
            self._closed = reason
            jobs = list(self._jobs)
            self._work.notify_all()
            self._untokenized_work.notify_all()
        for job in jobs:
            self._fail(job, Unavailable(reason, retry_after_seconds=1))

    # Admission

    def _admit(self, job: Job, now: float) -> None:
        if self._closed is not None:
            raise Unavailable(self._closed, retry_after_seconds=1)
        left = job.request.deadline - now
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the request was queued")
        queued = self._queued_tokens
        if not queued:
            return
        wait = (queued + job.charge) / self._tokens_per_second if self._tokens_per_second else 0.0
        if queued + job.charge > self._max_queued_tokens or wait > ADMITTED_SHARE * left:
            drain = queued / self._tokens_per_second if self._tokens_per_second else 1.0
            raise Overloaded(
                f"{queued} tokens are waiting for the model; try again later",
                retry_after_seconds=max(0.05, drain / 2),
            )

    # Tokenisation

    def _tokenize_forever(self) -> None:
        while True:
            with self._lock:
                while not self._untokenized:
                    if self._closed is not None:
                        return
                    self._untokenized_work.wait()
                job = self._untokenized.popleft()
            self._tokenize_piece(job)
            if not job.finished and job.tokenized < len(job.request.texts):
                with self._lock:
                    self._untokenized.append(job)

    def _tokenize_piece(self, job: Job) -> None:
        """Tokenise the next texts of a job and queue them; whatever goes wrong fails the job alone."""
        began = time.monotonic()
        if job.finished:
            return
        if began > job.request.deadline:
            self._fail(job, DeadlineExceeded("the deadline passed in the queue"))
            return
        first = job.tokenized
        texts = _piece(job.request.texts, first)
        try:
            request = job.request
            piece = self._runtime.tokenize(texts, job.prompt, request.input_type, request.truncation_side)
            if not job.request.truncate:
                self._refuse_truncated(piece)
        except InvalidRequest as error:
            if error.index is not None:
                error.index += first
            self._fail(job, error)
            return
        except Exception:
            log.exception("Tokenisation failed")
            self._fail(job, ModelFailure("the request could not be tokenised"))
            return
        bulk = self._runtime.separate_bulk and job.bulk
        items = [Item(job, first + offset, tokens, bulk) for offset, tokens in enumerate(piece)]
        job.tokenization_seconds += time.monotonic() - began
        with self._lock:
            self._enqueue(job, items)

    def _refuse_truncated(self, piece: list[Tokens]) -> None:
        for offset, tokens in enumerate(piece):
            if tokens.truncated:
                raise InvalidRequest(
                    f"has more than {self._runtime.max_seq_length} tokens; send truncate=true to cut it",
                    index=offset,
                )

    def _enqueue(self, job: Job, items: list[Item]) -> None:
        if job.finished:
            return
        tag, bulk = job.tag, job.bulk
        for item in items:
            tokens = item.tokens
            heapq.heappush(self._heap, (tag, bulk, next(self._sequence), item))
            tag += tokens.length
            job.tokens += tokens.length
            if tokens.truncated:
                job.truncated.append(item.index)
        job.tag = tag
        job.tokenized += len(items)
        if job.tokenized == len(job.request.texts):
            self._queued_tokens += job.tokens - job.charge
            job.charge = job.tokens
        self._work.notify()

    # Batches

    def _run_forever(self, lane: int) -> None:
        """A lane's thread: nothing ends it but closing, a lost device, or a fault of its own code."""
        try:
            while True:
                with self._lock:
                    while not self._heap:
                        if self._closed is not None:
                            return
                        self._work.wait()
                    now = time.monotonic()
                    batch, expired = self._next_batch(now)
                    if self._heap:
                        self._work.notify()
                    alone = not self._running and not self._heap
                    self._measured = now if not self._running else self._measured
                    self._running[lane] = now
                for job in expired:
                    self._fail(job, DeadlineExceeded("the deadline passed in the queue"))
                self._try(batch, lane, alone)
        except DeviceLost as error:
            self._give_up(str(error))
        except BaseException:
            log.critical("The batcher failed", exc_info=True)
            self._give_up("the batcher failed")

    def _try(self, batch: list[Item], lane: int, alone: bool) -> None:
        try:
            self._run(batch, lane, alone)
        except DeviceLost:
            raise
        except Exception:
            log.exception("A batch failed outside the model")
            for item in batch:
                self._fail(item.job, ModelFailure("the service failed on this request"))
        finally:
            with self._lock:
                del self._running[lane]

    def _give_up(self, reason: str) -> None:
        self._on_device_lost(reason)
        self.close(reason)

    def _next_batch(self, now: float) -> tuple[list[Item], set[Job]]:
        if now > self._budget_lowered_until:
            self._budget = self._runtime.max_batch_tokens
        window: list[tuple[float, bool, int, Item]] = []
        expired: set[Job] = set()
        tokens = 0
        while self._heap and tokens < WINDOW_BATCHES * self._budget and len(window) < WINDOW_TEXTS:
            entry = heapq.heappop(self._heap)
            job = entry[-1].job
            if job.finished or job in expired:
                continue
            if now > job.request.deadline:
                expired.add(job)
                continue
            window.append(entry)
            tokens += entry[-1].tokens.length
        if not window:
            return [], expired
        chosen = self._choose([entry[-1] for entry in window], now)
        for position, entry in enumerate(window):
            if position not in chosen:
                heapq.heappush(self._heap, entry)
        batch = [window[position][-1] for position in sorted(chosen)]
        served = sum(item.tokens.length for item in batch)
        first = window[0][0]
        if all(entry[1] for entry in window):
            # Bulk runs and nothing small waits: what comes now is next. (Bulk texts may be over due,
            # passed over for others of like length; a newcomer must not wait for all of those.)
            self._virtual_time = first
        else:
            self._virtual_time = max(first, self._virtual_time + served / max(1, len(self._jobs)))
        return batch, expired

    def _choose(self, window: list[Item], now: float) -> set[int]:
        """Positions in the window that make the next batch: the first, and its like in length."""
        head, bulk = window[0].tokens, window[0].bulk
        budget = self._budget // BULK_SHARE if bulk and now < self._small_until else self._budget
        free_padding = 0 if self._heap else self._runtime.free_padding_tokens
        like = [i for i, item in enumerate(window) if item.bulk == bulk and item.tokens.group == head.group]
        like.sort(key=lambda i: window[i].tokens.length)
        lengths = [window[i].tokens.length for i in like]
        low = high = like.index(0)
        total = longest = head.length
        while True:
            # Growing the batch downwards pads one more text; upwards it pads all those in it.
            size = high - low + 2
            options = []
            if low > 0:
                padded = longest * size
                options.append((padded - total - lengths[low - 1], padded, low - 1, high))
            if high + 1 < len(like):
                padded = lengths[high + 1] * size
                options.append((padded - total - lengths[high + 1], padded, low, high + 1))
            waste, padded, new_low, new_high = min(options, default=(0, budget + 1, 0, 0))
            if padded > budget or waste > max(free_padding, PADDING_SHARE * padded):
                return set(like[low : high + 1])
            low, high = new_low, new_high
            longest, total = lengths[high], padded - waste

    def _run(self, batch: list[Item], lane: int, alone: bool) -> None:
        """Embed a batch; on failure halve it until only the guilty texts are left, and fail those."""
        parts = [batch]
        while parts:
            part = [item for item in parts.pop() if not item.job.finished]
            if not part:
                continue
            self._running[lane] = began = time.monotonic()
            try:
                vectors = self._runtime.forward([item.tokens for item in part], lane, alone)
                if len(vectors) != len(part):
                    raise RuntimeError(f"{len(vectors)} vectors came back for {len(part)} texts")
            except DeviceLost:
                raise
            except Exception as error:
                parts += self._narrow(part, error)
                continue
            ended = time.monotonic()
            self._deliver(part, vectors, began, ended)
            metrics.record_batch([item.tokens.length for item in part], ended - began)

    def _narrow(self, part: list[Item], error: Exception) -> list[list[Item]]:
        out_of_memory = isinstance(error, OutOfMemory)
        if out_of_memory:
            metrics.OUT_OF_MEMORY_HALVINGS.inc()
            log.warning("Out of memory with %d texts; halving", len(part))
            self._budget = max(self._runtime.max_seq_length, self._budget // 2)
            self._budget_lowered_until = time.monotonic() + LOWERED_BUDGET_SECONDS
        if len(part) > 1:
            half = len(part) // 2
            return [part[half:], part[:half]]
        item = part[0]
        log.error("A text of %d tokens could not be embedded", item.tokens.length, exc_info=error)
        why = "does not fit in the device's memory" if out_of_memory else "could not be embedded"
        self._fail(item.job, ModelFailure(why, index=item.index))
        return []

    def _measure(self, part: Sequence[Item], ended: float) -> None:
        """Keep the rate of the last batches, each by its weight: a lone short text says little."""
        tokens = sum(item.tokens.length for item in part)
        self._recent_tokens = RECENT * self._recent_tokens + tokens
        self._recent_seconds = RECENT * self._recent_seconds + max(0.0, ended - self._measured)
        self._measured = ended
        self._tokens_per_second = self._recent_tokens / max(self._recent_seconds, 1e-6)

    def _deliver(self, part: list[Item], vectors: Vectors, began: float, ended: float) -> None:
        if not np.isfinite(vectors).all():
            vectors = self._recompute(part, vectors)
        unit = vectors if self._runtime.normalized else normalize(vectors)
        jobs: set[Job] = set()
        # Locked, since another lane may have texts of the same jobs.
        with self._lock:
            self._measure(part, ended)
            for row, item in enumerate(part):
                job, request = item.job, item.job.request
                raw = request.dimensions is not None or not request.normalize
                vector = (vectors if raw else unit)[row : row + 1]
                if len(request.texts) == 1:
                    job.vectors = vector
                else:
                    if job.vectors is None:
                        job.vectors = np.empty((len(request.texts), vectors.shape[1]), np.float32)
                    job.vectors[item.index] = vector
                job.remaining -= 1
                jobs.add(job)
            for job in jobs:
                # Lanes overlap; a moment in which two have texts of this job counts once.
                job.inference_seconds += max(0.0, ended - max(began, job.inferred_until))
                job.inferred_until = max(ended, job.inferred_until)
                job.started = min(job.started or began, began)
        for job in jobs:
            if not job.remaining and not job.finished:
                self._complete(job)

    def _recompute(self, part: list[Item], vectors: Vectors) -> Vectors:
        """Replace each non-finite vector by one computed alone in float32, or fail its job."""
        vectors = vectors.copy()
        for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            item = part[row]
            metrics.NONFINITE_RECOMPUTATIONS.inc()
            log.warning("A vector was not finite; computing it again in float32")
            try:
                vectors[row] = self._runtime.forward_exact(item.tokens)[0]
                finite = bool(np.isfinite(vectors[row]).all())
            except DeviceLost:
                raise
            except Exception:
                log.exception("Computing a vector again failed")
                finite = False
            if not finite:
                self._fail(item.job, ModelFailure("has a vector that is not finite", index=item.index))
        return vectors

    # Outcomes

    def _complete(self, job: Job) -> None:
        vectors = job.vectors
        assert vectors is not None
        request = job.request
        if request.dimensions is not None:
            vectors = vectors[:, : request.dimensions]
            vectors = normalize(vectors) if request.normalize else np.ascontiguousarray(vectors)
        timings = Timings(
            tokenization_ms=job.tokenization_seconds * 1e3,
            queue_ms=max(0.0, job.started - job.submitted - job.tokenization_seconds) * 1e3,
            inference_ms=job.inference_seconds * 1e3,
        )
        truncated = sorted(job.truncated)
        self._finish(
            job, Embeddings(vectors=vectors, tokens=job.tokens, truncated=truncated, timings=timings)
        )

    def _fail(self, job: Job, error: ServiceError) -> None:
        self._finish(job, error)

    def _finish(self, job: Job, outcome: Outcome) -> None:
        with self._lock:
            if job.finished:
                return
            job.finished = True
            self._forget(job)
        try:
            job.on_done(outcome)
        except Exception:
            log.exception("An outcome could not be handed over")

    def _forget(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.discard(job)
            self._queued_tokens -= job.charge


def normalize(vectors: Vectors) -> Vectors:
    """Rows of length 1, as torch.nn.functional.normalize makes them: a zero row stays zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    result: Vectors = vectors / np.maximum(norms, 1e-12)[:, None]
    return result


def _piece(texts: list[str], first: int) -> list[str]:
    last, characters = first, 0
    while last < len(texts) and last - first < PIECE_TEXTS and characters < PIECE_CHARACTERS:
        characters += len(texts[last])
        last += 1
    return texts[first:last]
