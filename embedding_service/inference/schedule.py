"""The jobs in progress: accepted, queued, taken into batches, and given their vectors. Not thread-safe."""

from collections.abc import Hashable

import numpy as np

from embedding_service.engine import EmbedRequest, Vectors
from embedding_service.errors import InvalidRequest
from embedding_service.inference.admission import Admission
from embedding_service.inference.identical import IdenticalTexts, Reduction, reduce
from embedding_service.inference.job import (
    Job,
    Part,
    Piece,
    Receiver,
    lengths_of,
    refuse_truncated,
    truncated_of,
)
from embedding_service.inference.model import Model
from embedding_service.inference.priority_queue import PriorityQueue
from embedding_service.inference.vector_cache import VectorCache
from embedding_service.observability import metrics

# How long batches stay halved after running out of memory.
LOWERED_SECONDS = 60.0

# An estimate for admission, until a text is tokenized.
CHARACTERS_PER_TOKEN = 4


class Schedule:
    """What the batcher's threads share, under its lock. A job is in it from `accept` to `end`."""

    def __init__(self, model: Model, *, max_queued_tokens: int, cache_bytes: int) -> None:
        self._model = model
        self._queue = PriorityQueue(separate_bulk=model.on_cpu)
        self._identical = IdenticalTexts(self._queue)
        self._cache = VectorCache(cache_bytes) if cache_bytes else None
        self._admission = Admission(max_queued_tokens)
        self._jobs: set[Job] = set()
        self._most_tokens = model.info.max_batch_tokens
        self._lowered_until = 0.0
        self._last_ended = 0.0

    def __bool__(self) -> bool:
        """Whether texts wait for a batch."""
        return bool(self._queue)

    @property
    def queued_tokens(self) -> int:
        """Tokens accepted and not yet answered."""
        return self._admission.queued_tokens

    def jobs(self, receiver: Receiver | None = None) -> list[Job]:
        """The jobs of one receiver, or of all."""
        return [job for job in self._jobs if receiver is None or job.receiver == receiver]

    def accept(self, request: EmbedRequest, receiver: Receiver, number: int, now: float) -> Job:
        """A job for the request. Raises InvalidRequest, Overloaded or DeadlineExceeded."""
        if not request.texts:
            raise InvalidRequest("there is no text to embed")
        model = self._model
        _check_dimensions(request.dimensions, model.info.embedding_dimension)
        prompt = model.prompt(request)
        # Everything other than the text that affects a vector.
        context = (model.info.fingerprint, prompt, request.input_type, request.truncation_side)
        reduction = self._reduce(request, context)
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
            charge=min(characters // CHARACTERS_PER_TOKEN + 2 * count, model.info.max_seq_length * count),
        )
        if self._cache is not None:
            job.hits = reduction.hits if reduction is not None else 0
            metrics.record_cache(job.hits, len(request.texts) - job.hits)
        self._admission.admit(job.charge, job.deadline, now, background=job.background)
        self._jobs.add(job)
        self._queue.add(job, now)
        return job

    def _reduce(self, request: EmbedRequest, context: Hashable) -> Reduction | None:
        reduction = reduce(request.texts, context, self._cache)
        if reduction is not None and request.overflow == "error":
            refuse_truncated(reduction.cut_places(), self._model.info.max_seq_length)
        return reduction

    def enqueue(self, job: Job, piece: Piece) -> None:
        """Queue tokenized texts of a job, unless they are running already for another."""
        first, size, lengths = piece.first, piece.count, piece.lengths
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

    def take(self, now: float, *, idle: bool) -> tuple[list[Part], list[Job]]:
        """Take the next batch, and the jobs whose deadline has passed; `idle` if no batch is running."""
        if now > self._lowered_until:
            self._most_tokens = self._model.info.max_batch_tokens
        if idle:
            self._admission.begin(now)
        budget = self._model.budget
        most = min(budget.tokens, self._most_tokens)
        taken, expired = self._queue.next_batch(most, budget.overhead_tokens, now)
        parts = []
        for job, rows in taken:
            assert isinstance(job, Job)
            mine = self._identical.start(job, rows)
            if len(mine):
                parts.append(job.part(mine))
        return parts, [job for job in expired if isinstance(job, Job)]

    def lower(self, now: float) -> None:
        """Halve batches for a while, since one did not fit in memory."""
        most = min(self._model.budget.tokens, self._most_tokens)
        self._most_tokens = max(self._model.info.max_seq_length, most // 2)
        self._lowered_until = now + LOWERED_SECONDS

    def measure(self, tokens: int, padded: int, began: float, ended: float, *, whole: bool) -> None:
        """Count a batch that has run; `whole` if it had every core to itself."""
        self._admission.measure(tokens, ended)
        # On an accelerator, batches of two lanes run in turn: count only the time since the last one ended.
        since = max(began, self._last_ended) if not self._model.on_cpu else began
        # A batch that uses every core has another cost, and the budget is for batches in lanes.
        if not whole:
            self._model.budget.observe(padded, ended - since)
        self._last_ended = ended

    def deliver(self, part: Part, vectors: Vectors, unit: Vectors, began: float, ended: float) -> list[Job]:
        """Give the vectors of a part, and those scaled to length 1, to all jobs that wait for them.

        Returns the jobs that have their last vector now, and so have ended.
        """
        job, rows = part.job, part.rows
        takers = [] if job.finished else [(job, rows, slice(None))]
        for position, other, row in self._identical.others(job, rows):
            assert isinstance(other, Job)
            takers.append((other, np.array([row], np.int32), slice(position, position + 1)))
        for taker, places, span in takers:
            taker.accept(places, (vectors if taker.wants_raw else unit)[span])
            taker.computed(began, ended)
        if self._cache is not None:
            _keep(self._cache, part, vectors)
        self._identical.deliver(job, rows)
        return [taker for taker, _, _ in takers if not taker.remaining and self.end(taker)]

    def give_up_on(self, part: Part) -> list[tuple[Job, int]]:
        """The jobs that wait for the rows of a part, each with its own row. No job can join them any more."""
        takers = [(part.job, row) for row in part.rows.tolist()]
        for _, other, row in self._identical.others(part.job, part.rows):
            assert isinstance(other, Job)
            takers.append((other, row))
        self._identical.settle(part.job, part.rows)
        return takers

    def end(self, job: Job, *, dropped: bool = False) -> bool:
        """Forget a job, `dropped` if it lacks vectors; False if it has ended before."""
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


def _keep(cache: VectorCache, part: Part, vectors: Vectors) -> None:
    job, rows = part.job, part.rows.tolist()
    lengths = lengths_of(part.slices)
    for row, vector, tokens, cut in zip(rows, vectors, lengths, truncated_of(part.slices), strict=True):
        if np.isfinite(vector).all():
            cache.put(job.context, job.texts[row], vector, tokens, cut)
