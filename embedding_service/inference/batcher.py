"""The batcher: threads that tokenize, and one thread per lane that runs a batch while the next gathers."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from embedding_service import metrics
from embedding_service.engine import EmbedRequest, Vectors
from embedding_service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailure,
    ServiceError,
    Unavailable,
)
from embedding_service.inference.admission import Admission
from embedding_service.inference.identical import IdenticalTexts, reduce
from embedding_service.inference.job import (
    Job,
    Outcome,
    Part,
    Piece,
    Receiver,
    halves,
    lengths_of,
    merged,
    normalize,
    truncated_of,
)
from embedding_service.inference.priority_queue import PriorityQueue
from embedding_service.inference.runtime import (
    DeviceLost,
    Lane,
    OutOfMemory,
    Prepared,
    Runtime,
    Slice,
)
from embedding_service.inference.vector_cache import VectorCache

log = logging.getLogger(__name__)

# A request of up to this many texts and characters is tokenized by the thread that brings it, together
# with others that it brings, which saves a thread switch. A larger one is tokenized by the tokenizer
# thread in pieces, in turn, so that no request waits for the tokenization of another's 2,048 texts.
INLINE_TEXTS, INLINE_CHARACTERS = 64, 16_384
PIECE_TEXTS, PIECE_CHARACTERS = 128, 131_072

# From this many texts on, the tokenizer's own threads save more than they cost.
PARALLEL_TEXTS = 16

# How long batches stay halved after running out of memory.
LOWERED_SECONDS = 60.0

CHARACTERS_PER_TOKEN = 4


class Batcher:
    """Turns requests into batches for a Runtime. Every method is safe from any thread."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_queued_tokens: int,
        cache_bytes: int = 0,
        on_device_lost: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._runtime = runtime
        self._on_device_lost = on_device_lost
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._untokenized_work = threading.Condition(self._lock)
        self._untokenized: deque[Job] = deque()
        self._queue = PriorityQueue(separate_bulk=runtime.separate_bulk)
        self._identical = IdenticalTexts(self._queue)
        self._cache = VectorCache(cache_bytes) if cache_bytes else None
        self._admission = Admission(max_queued_tokens)
        self._jobs: set[Job] = set()
        self._most_tokens = runtime.max_batch_tokens
        self._lowered_until = 0.0
        self._closed: str | None = None
        # When each lane began the batch it runs.
        self._running: dict[int, float] = {}
        self._last_ended = 0.0
        threading.Thread(target=self._tokenize_forever, name="tokenizer", daemon=True).start()
        for number, lane in enumerate(runtime.lanes):
            threading.Thread(
                target=self._run_forever, args=(number, lane), name=f"model-{number}", daemon=True
            ).start()

    @property
    def running_since(self) -> float | None:
        """When the batch that has been running longest began, on the monotonic clock."""
        return min(list(self._running.values()), default=None)

    @property
    def queued_tokens(self) -> int:
        """Tokens accepted and not yet answered."""
        return self._admission.queued_tokens

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
        """Drop a job that nothing waits for; its receiver is not called."""
        with self._lock:
            if not job.finished:
                self._end(job, dropped=True)

    def cancel_all(self, receiver: Receiver) -> None:
        """Drop all jobs of a receiver that is gone."""
        with self._lock:
            for job in [job for job in self._jobs if job.receiver == receiver]:
                self._end(job, dropped=True)

    def close(self, reason: str) -> None:
        """Refuse new requests, fail the waiting ones with Unavailable, and end the threads."""
        with self._lock:
            self._closed = reason
            jobs = list(self._jobs)
            self._work.notify_all()
            self._untokenized_work.notify_all()
        self._fail([(job, Unavailable(reason, retry_after_seconds=1)) for job in jobs])

    # Accepting

    def _accept(self, request: EmbedRequest, receiver: Receiver, number: int, now: float) -> Job:
        if self._closed is not None:
            raise Unavailable(self._closed, retry_after_seconds=1)
        if not request.texts:
            raise InvalidRequest("there is no text to embed")
        runtime = self._runtime
        _check_dimensions(request.dimensions, runtime.info.embedding_dimension)
        prompt = runtime.prompt(request)
        # Everything other than the text that affects a vector.
        context = (runtime.info.fingerprint, prompt, request.input_type, request.truncation_side)
        reduction = reduce(request.texts, context, self._cache)
        if reduction is not None and not request.truncate:
            self._refuse_cut(reduction.cut_places())
        texts = request.texts if reduction is None else reduction.texts
        count = len(texts)
        characters = sum(map(len, texts)) + len(prompt or "") * count
        job = Job(
            texts=texts,
            deadline=request.deadline,
            background=request.priority == "background",
            context=context,
            request=request,
            receiver=receiver,
            number=number,
            prompt=prompt,
            submitted=now,
            reduction=reduction,
            characters=characters,
            remaining=count,
            charge=min(characters // CHARACTERS_PER_TOKEN + 2 * count, runtime.max_seq_length * count),
        )
        if self._cache is not None:
            job.hits = reduction.hits if reduction is not None else 0
            metrics.record_cache(job.hits, len(request.texts) - job.hits)
        self._admission.admit(job.charge, job.deadline, now, background=job.background)
        self._jobs.add(job)
        self._queue.add(job, now)
        return job

    # Tokenizing

    def _dispatch(self, jobs: list[Job]) -> None:
        """Tokenize small jobs here, those of one context at once, and leave large ones to the thread."""
        together: dict[Hashable, list[Job]] = {}
        large = []
        for job in jobs:
            if len(job.texts) > INLINE_TEXTS or job.characters > INLINE_CHARACTERS:
                large.append(job)
            else:
                together.setdefault(job.context, []).append(job)
        for small in together.values():
            self._guarded(self._tokenize_together, small)
        if large:
            with self._lock:
                self._untokenized += large
                self._untokenized_work.notify()

    def _tokenize_forever(self) -> None:
        while True:
            with self._lock:
                while not self._untokenized:
                    if self._closed is not None:
                        return
                    self._untokenized_work.wait()
                job = self._untokenized.popleft()
            self._guarded(self._tokenize_piece, [job])
            if not job.finished and job.tokenized < len(job.texts):
                with self._lock:
                    self._untokenized.append(job)

    def _guarded(self, step: Callable[[list[Job]], None], jobs: list[Job]) -> None:
        """Run a step; an exception fails only these jobs and never ends the thread."""
        try:
            step(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._guarded(step, [job])
                return
            if not isinstance(error, ServiceError):
                log.exception("Tokenization failed")
                error = ModelFailure("the request could not be tokenized")
            self._fail([(jobs[0], error)])

    def _tokenize_together(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.finished and not job.tokenized]
        answered = [job for job in jobs if not job.texts]
        jobs = [job for job in jobs if job.texts]
        if jobs:
            self._tokenize([(job, 0, len(job.texts)) for job in jobs])
        if answered:
            # Entirely from the cache.
            with self._lock:
                answered = [job for job in answered if self._end(job)]
            self._complete(answered)

    def _tokenize_piece(self, jobs: list[Job]) -> None:
        (job,) = jobs
        if not job.finished:
            first = job.tokenized
            self._tokenize([(job, first, len(_piece(job.texts, first)))])

    def _tokenize(self, pieces: list[tuple[Job, int, int]]) -> None:
        """Tokenize and queue texts of jobs of one context, each piece a job, its first text and its size."""
        began = time.monotonic()
        job, first, size = pieces[0]
        if began > job.deadline:
            raise DeadlineExceeded("the deadline passed in the queue")
        texts = [text for job, first, size in pieces for text in job.texts[first : first + size]]
        request, runtime = job.request, self._runtime
        idle = not self._running and size > INLINE_TEXTS
        parallel = len(texts) >= PARALLEL_TEXTS and (runtime.uses_accelerator or idle)
        try:
            prepared = runtime.prepare(
                texts, job.prompt, request.input_type, request.truncation_side, parallel=parallel
            )
        except InvalidRequest as error:
            if error.index is not None:
                error.index = job.index_of(first + error.index)
            raise
        self._refuse_truncated(pieces, prepared)
        seconds = time.monotonic() - began
        broken: list[tuple[Job, ServiceError]] = []
        with self._lock:
            offset = 0
            for job, first, size in pieces:
                job.tokenization_seconds += seconds
                try:
                    if not job.finished:
                        self._enqueue(job, Piece(first, size, prepared, offset))
                except Exception:
                    log.exception("Texts could not be queued")
                    broken.append((job, ModelFailure("the service failed on this request")))
                offset += size
            self._work.notify()
        if broken:
            self._fail(broken)

    def _refuse_truncated(self, pieces: list[tuple[Job, int, int]], prepared: Prepared) -> None:
        if all(job.request.truncate for job, _, _ in pieces):
            return
        if len(pieces) > 1:
            raise ValueError("each for itself")
        job, first, _ = pieces[0]
        self._refuse_cut([job.index_of(first + row) for row in np.flatnonzero(prepared.truncated).tolist()])

    def _refuse_cut(self, places: list[int]) -> None:
        if places:
            raise InvalidRequest(
                f"has more than {self._runtime.max_seq_length} tokens; send truncate=true to cut it",
                index=min(places),
            )

    def _enqueue(self, job: Job, piece: Piece) -> None:
        first, size, offset = piece.first, piece.count, piece.offset
        lengths = piece.prepared.lengths[offset : offset + size]
        rows = np.arange(first, first + size, dtype=np.int32)
        texts = job.texts if size == len(job.texts) else job.texts[first : first + size]
        running = self._identical.add(job, first, texts)
        job.pieces.append(piece)
        job.tokenized += size
        job.read_tokens += sum(lengths.tolist())
        if running:
            keep = ~np.isin(rows, running)
            lengths, rows = lengths[keep], rows[keep]
        if len(rows):
            self._queue.push(job, lengths, rows, piece.prepared.group)
        if job.tokenized == len(job.texts):
            self._admission.release(job.charge - job.read_tokens, background=job.background)
            job.charge = job.read_tokens

    # Running

    def _run_forever(self, number: int, lane: Lane) -> None:
        """A lane's thread; it ends if the batcher closes, the device is lost, or its own code is faulty."""
        try:
            while (found := self._next_batch(number)) is not None:
                parts, expired, alone = found
                if expired:
                    late = DeadlineExceeded("the deadline passed in the queue")
                    self._fail([(job, late) for job in expired])
                self._try(parts, number, (self._runtime.whole if alone else None) or lane)
        except DeviceLost as error:
            self._lose(str(error))
        except BaseException:
            log.critical("The batcher failed", exc_info=True)
            self._lose("the batcher failed")

    def _next_batch(self, number: int) -> tuple[list[Part], list[Job], bool] | None:
        """Wait for work and take a batch; None once the batcher is closed.

        Also returns the jobs whose deadline has passed, and whether nothing else is running or waiting.
        """
        queue, runtime = self._queue, self._runtime
        with self._lock:
            while not queue:
                if self._closed is not None:
                    return None
                self._work.wait()
            now = time.monotonic()
            if now > self._lowered_until:
                self._most_tokens = runtime.max_batch_tokens
            budget = runtime.budget
            taken, expired = queue.next_batch(
                min(budget.tokens, self._most_tokens), budget.overhead_tokens, now
            )
            parts = []
            for job, rows in taken:
                assert isinstance(job, Job)
                mine = self._identical.start(job, rows)
                if len(mine):
                    parts.append(job.part(mine))
            if queue:
                self._work.notify()
            alone = not self._running and not queue
            if not self._running:
                self._admission.begin(now)
            self._running[number] = now
            return parts, [job for job in expired if isinstance(job, Job)], alone

    def _try(self, parts: list[Part], number: int, lane: Lane) -> None:
        try:
            self._run(parts, number, lane)
        except DeviceLost:
            raise
        except Exception:
            log.exception("A batch failed outside the model")
            error = ModelFailure("the service failed on this request")
            self._fail([(taker, error) for part in parts for taker, _ in self._give_up_on(part)])
        finally:
            with self._lock:
                del self._running[number]

    def _lose(self, reason: str) -> None:
        self._on_device_lost(reason)
        self.close(reason)

    def _run(self, parts: list[Part], number: int, lane: Lane) -> None:
        """Embed a batch. If it fails, halve it until only the faulty texts are left, and fail those."""
        waiting = [parts]
        while waiting:
            # A text that another request shares is computed even if the request that queued it is gone.
            batch = [part for part in waiting.pop() if not part.job.finished or part.job.shares]
            if not batch:
                continue
            self._running[number] = began = time.monotonic()
            texts = sum([len(part.rows) for part in batch])
            slices = merged(batch)
            try:
                vectors = lane.forward(slices)
                if len(vectors) != texts:
                    raise RuntimeError(f"{len(vectors)} vectors came back for {texts} texts")
            except DeviceLost:
                raise
            except Exception as error:
                waiting += self._narrow(batch, texts, error)
                continue
            self._deliver(batch, slices, vectors, began, lane)

    def _narrow(self, batch: list[Part], texts: int, error: Exception) -> list[list[Part]]:
        out_of_memory = isinstance(error, OutOfMemory)
        if out_of_memory:
            metrics.OUT_OF_MEMORY_HALVINGS.inc()
            log.warning("Out of memory with %d texts; halving", texts)
            with self._lock:
                most = min(self._runtime.budget.tokens, self._most_tokens)
                self._most_tokens = max(self._runtime.max_seq_length, most // 2)
                self._lowered_until = time.monotonic() + LOWERED_SECONDS
        if texts > 1:
            first, second = halves(batch, texts // 2)
            return [second, first]
        log.error("A text could not be embedded", exc_info=error)
        why = "does not fit in the device's memory" if out_of_memory else "could not be embedded"
        self._fail_text(batch[0], why)
        return []

    # Delivering

    def _deliver(
        self, batch: list[Part], slices: list[Slice], vectors: Vectors, began: float, lane: Lane
    ) -> None:
        ended = time.monotonic()
        if not np.isfinite(vectors).all():
            vectors = self._recompute(batch, vectors)
        unit = vectors if self._runtime.normalized else normalize(vectors)
        lengths = lengths_of(slices)
        tokens, padded = sum(lengths), max(lengths) * len(lengths)
        done: list[Job] = []
        try:
            with self._lock:
                self._measure(tokens, padded, began, ended, lane)
                first = 0
                for part in batch:
                    last = first + len(part.rows)
                    self._scatter(part, vectors[first:last], unit[first:last], (began, ended), done)
                    first = last
        finally:
            self._complete(done)
        metrics.record_batch(len(lengths), tokens, padded, ended - began)

    def _scatter(
        self, part: Part, vectors: Vectors, unit: Vectors, when: tuple[float, float], done: list[Job]
    ) -> None:
        """Give the vectors of a part to all who wait for them; `done` gets the jobs that have their last."""
        job, rows = part.job, part.rows
        takers = [] if job.finished else [(job, rows, slice(None))]
        for position, other, row in self._identical.others(job, rows):
            assert isinstance(other, Job)
            takers.append((other, np.array([row], np.int32), slice(position, position + 1)))
        for taker, places, span in takers:
            taker.accept(places, (vectors if taker.wants_raw else unit)[span])
            taker.computed(*when)
        if self._cache is not None:
            self._keep(self._cache, part, vectors)
        self._identical.deliver(job, rows)
        done += [taker for taker, _, _ in takers if not taker.remaining and self._end(taker)]

    def _measure(self, tokens: int, padded: int, began: float, ended: float, lane: Lane) -> None:
        self._admission.measure(tokens, ended)
        # Batches in two lanes of one accelerator run one after the other: each has the time after the last.
        since = max(began, self._last_ended) if self._runtime.uses_accelerator else began
        # With every core a batch costs something else, and the budget is for those in lanes.
        if lane is not self._runtime.whole:
            self._runtime.budget.observe(padded, ended - since)
        self._last_ended = ended

    def _keep(self, cache: VectorCache, part: Part, vectors: Vectors) -> None:
        job = part.job
        lengths, truncated = lengths_of(part.slices), truncated_of(part.slices)
        for row, vector, tokens, cut in zip(part.rows.tolist(), vectors, lengths, truncated, strict=True):
            if np.isfinite(vector).all():
                cache.put(job.context, job.texts[row], vector, tokens, cut)

    def _recompute(self, batch: list[Part], vectors: Vectors) -> Vectors:
        """Replace each non-finite vector by one computed alone in float32, or fail its requests."""
        vectors = vectors.copy()
        parts = [part.cut(at, at + 1) for part in batch for at in range(len(part.rows))]
        for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
            metrics.NONFINITE_RECOMPUTATIONS.inc()
            log.warning("A vector was not finite; computing it again in float32")
            try:
                vectors[row] = self._runtime.forward_exact(parts[row].slices[0])[0]
                finite = bool(np.isfinite(vectors[row]).all())
            except DeviceLost:
                raise
            except Exception:
                log.exception("Computing a vector again failed")
                finite = False
            if not finite:
                self._fail_text(parts[row], "has a vector that is not finite")
        return vectors

    # Outcomes

    def _give_up_on(self, part: Part) -> list[tuple[Job, int]]:
        """The jobs that wait for the rows of a part, each with its own row; nobody can join them any more."""
        takers = [(part.job, row) for row in part.rows.tolist()]
        with self._lock:
            for _, other, row in self._identical.others(part.job, part.rows):
                assert isinstance(other, Job)
                takers.append((other, row))
            self._identical.settle(part.job, part.rows)
        return takers

    def _fail_text(self, part: Part, why: str) -> None:
        """Fail all that wait for the one text of a part."""
        takers = self._give_up_on(part)
        self._fail([(job, ModelFailure(why, index=job.index_of(row))) for job, row in takers])

    def _fail(self, failures: Sequence[tuple[Job, ServiceError]]) -> None:
        with self._lock:
            failures = [(job, error) for job, error in failures if self._end(job, dropped=True)]
        for job, error in failures:
            _hand_over(job.receiver, [(job.number, error)])

    def _complete(self, jobs: list[Job]) -> None:
        """Hand over the answers of jobs that came out of one batch: those of a receiver together."""
        outcomes: dict[Receiver, list[tuple[int, Outcome]]] = {}
        for job in jobs:
            try:
                outcome: Outcome = job.outcome(self._runtime.normalized)
            except Exception:
                log.exception("An answer could not be made")
                outcome = ModelFailure("the service failed on this request")
            outcomes.setdefault(job.receiver, []).append((job.number, outcome))
        for receiver, together in outcomes.items():
            _hand_over(receiver, together)

    def _end(self, job: Job, *, dropped: bool = False) -> bool:
        """Forget a job, with the lock held; False if it has ended before."""
        if job.finished:
            return False
        job.finished = True
        self._jobs.discard(job)
        self._queue.remove(job)
        self._admission.release(job.charge, background=job.background)
        if dropped:
            self._identical.drop(job)
        return True


def _check_dimensions(wanted: int | None, dimension: int) -> None:
    if wanted is not None and not 1 <= wanted <= dimension:
        raise InvalidRequest(f"must be between 1 and {dimension}, not {wanted}", field="dimensions")


def _hand_over(receiver: Receiver, outcomes: Sequence[tuple[int, Outcome]]) -> None:
    try:
        receiver(outcomes)
    except Exception:
        log.exception("Outcomes could not be handed over")


def _piece(texts: list[str], first: int) -> list[str]:
    last, characters = first, 0
    while last < len(texts) and last - first < PIECE_TEXTS and characters < PIECE_CHARACTERS:
        characters += len(texts[last])
        last += 1
    return texts[first:last]
