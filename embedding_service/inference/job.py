"""A request in progress: what it asks for, the texts to compute, and the vectors received so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from embedding_service.engine import Embeddings, EmbedRequest, Timings, Vectors
from embedding_service.errors import InvalidRequest, ServiceError
from embedding_service.inference.identical import Reduction, Sharer
from embedding_service.inference.tokenized import BoolArray, IntArray, Rows, TokenizedTexts
from embedding_service.inference.vector_cache import vectors_of

Outcome = Embeddings | ServiceError

# Receives outcomes that finished together, each with the number of its request.
Receiver = Callable[[Sequence[tuple[int, Outcome]]], None]


@dataclass(slots=True, frozen=True, eq=False)
class Piece:
    """Texts of a job, from `first` on, which are rows of `prepared` from `offset` on."""

    first: int
    count: int
    prepared: TokenizedTexts
    offset: int

    @property
    def lengths(self) -> IntArray:
        """The tokens of each text."""
        return self.prepared.lengths[self.offset : self.offset + self.count]

    @property
    def truncated(self) -> BoolArray:
        """Whether each text was cut."""
        return self.prepared.truncated[self.offset : self.offset + self.count]


@dataclass(slots=True, eq=False)
class Part:
    """One job's share of a batch: rows of the job, and the same texts as the model reads them."""

    job: "Job"
    rows: IntArray
    slices: list[Rows]

    def cut(self, first: int, last: int) -> "Part":
        """Some of the rows, by position."""
        return self.job.part(self.rows[first:last])


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Sharer):
    """One accepted request. Its fields are guarded by the batcher's lock, or by its tokenizer thread.

    `texts` are those to compute, which are all of the request unless there is a `reduction`.
    """

    request: EmbedRequest
    receiver: Receiver
    number: int
    prompt: str | None
    submitted: float
    reduction: Reduction | None
    characters: int
    charge: int
    hits: int | None = None
    read_tokens: int = 0
    pieces: list[Piece] = field(default_factory=list)
    tokenized: int = 0
    remaining: int = 0
    vectors: Vectors | None = None
    tokenization_seconds: float = 0.0
    started: float = 0.0
    inference_seconds: float = 0.0
    inferred_until: float = 0.0

    @property
    def wants_raw(self) -> bool:
        """Whether it needs the model's own vectors, to truncate them or because they stay unnormalised."""
        return self.request.dimensions is not None or not self.request.normalize

    def index_of(self, row: int) -> int:
        """The index in the request of a text to compute."""
        return row if self.reduction is None else int(np.flatnonzero(self.reduction.places == row)[0])

    def part(self, rows: IntArray) -> Part:
        """These rows as a part of a batch."""
        if len(self.pieces) == 1:
            piece = self.pieces[0]
            return Part(self, rows, [Rows(piece.prepared, rows + piece.offset if piece.offset else rows)])
        rows = np.sort(rows)
        cuts = [*np.searchsorted(rows, [piece.first for piece in self.pieces]).tolist(), len(rows)]
        slices = [
            Rows(piece.prepared, rows[low:high] - (piece.first - piece.offset))
            for piece, low, high in zip(self.pieces, cuts, cuts[1:], strict=False)
            if high > low
        ]
        return Part(self, rows, slices)

    def accept(self, rows: IntArray, vectors: Vectors) -> None:
        """Store the vectors of these rows."""
        if len(self.texts) == 1:
            self.vectors = vectors
        else:
            if self.vectors is None:
                self.vectors = np.empty((len(self.texts), vectors.shape[1]), np.float32)
            self.vectors[rows] = vectors
        self.remaining -= len(vectors)

    def computed(self, began: float, ended: float) -> None:
        """Count the time of a batch that held some of its texts; overlapping batches count once."""
        self.inference_seconds += max(0.0, ended - max(began, self.inferred_until))
        self.inferred_until = max(ended, self.inferred_until)
        self.started = min(self.started or began, began)

    def outcome(self, normalized: bool) -> Embeddings:
        """The result. `normalized` says whether the model's vectors already have length 1."""
        vectors, tokens, truncated = self.vectors, self.read_tokens, self._truncated()
        if self.reduction is not None:
            vectors = self._expanded(self.reduction, normalized)
            tokens, truncated = self._expanded_counts(self.reduction)
        assert vectors is not None
        request = self.request
        if request.dimensions is not None:
            vectors = vectors[:, : request.dimensions]
            vectors = normalize(vectors) if request.normalize else np.ascontiguousarray(vectors)
        return Embeddings(
            vectors=vectors,
            tokens=tokens,
            truncated=truncated,
            timings=Timings(
                tokenization_ms=self.tokenization_seconds * 1e3,
                queue_ms=max(0.0, self.started - self.submitted - self.tokenization_seconds) * 1e3,
                inference_ms=self.inference_seconds * 1e3,
            ),
            cache_hits=self.hits,
        )

    def _truncated(self) -> list[int]:
        """For each computed text, whether it was truncated."""
        return [
            piece.first + row
            for piece in self.pieces
            for row, cut in enumerate(piece.truncated.tolist())
            if cut
        ]

    def _expanded(self, reduction: Reduction, normalized: bool) -> Vectors:
        found = [] if self.vectors is None else [self.vectors]
        if reduction.cached:
            cached = vectors_of(reduction.cached)
            found.append(cached if normalized or self.wants_raw else normalize(cached))
        expanded: Vectors = np.concatenate(found)[reduction.places]
        return expanded

    def _expanded_counts(self, reduction: Reduction) -> tuple[int, list[int]]:
        lengths = [length for piece in self.pieces for length in piece.lengths.tolist()]
        truncated = [cut for piece in self.pieces for cut in piece.truncated.tolist()]
        lengths += [entry.tokens for entry in reduction.cached]
        truncated += [entry.truncated for entry in reduction.cached]
        places = reduction.places.tolist()
        cut_places = [index for index, place in enumerate(places) if truncated[place]]
        return sum([lengths[place] for place in places]), cut_places


def merged(batch: Sequence[Part]) -> list[Rows]:
    """A batch as the model takes it; neighbours that were tokenized together become one slice."""
    slices = [one for part in batch for one in part.slices]
    if len(slices) == 1:
        return slices
    runs: list[tuple[TokenizedTexts, list[IntArray]]] = []
    for one in slices:
        if runs and runs[-1][0] is one.tokenized:
            runs[-1][1].append(one.rows)
        else:
            runs.append((one.tokenized, [one.rows]))
    return [Rows(texts, rows[0] if len(rows) == 1 else np.concatenate(rows)) for texts, rows in runs]


def lengths_of(slices: Sequence[Rows]) -> list[int]:
    """The tokens of each text."""
    return [length for one in slices for length in one.tokenized.lengths[one.rows].tolist()]


def truncated_of(slices: Sequence[Rows]) -> list[bool]:
    """Whether each text was cut."""
    return [cut for one in slices for cut in one.tokenized.truncated[one.rows].tolist()]


def halves(batch: Sequence[Part], at: int) -> tuple[list[Part], list[Part]]:
    """Split a batch in two, the first with `at` texts."""
    first: list[Part] = []
    second: list[Part] = []
    for part in batch:
        size = len(part.rows)
        here = min(max(at, 0), size)
        if here:
            first.append(part if here == size else part.cut(0, here))
        if here < size:
            second.append(part if not here else part.cut(here, size))
        at -= size
    return first, second


def refuse_truncated(indices: Sequence[int], max_seq_length: int) -> None:
    """Raise InvalidRequest if texts, by their index in the request, are too long and may not be cut."""
    if indices:
        raise InvalidRequest(
            f"has more than {max_seq_length} tokens; send truncate=true to cut it", index=min(indices)
        )


def normalize(vectors: Vectors) -> Vectors:
    """Scale rows to length 1 as torch.nn.functional.normalize does: a zero row stays zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    result: Vectors = vectors / np.maximum(norms, 1e-12)[:, None]
    return result
