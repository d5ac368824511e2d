"""A request in progress: what it asks for, its place in the queue, and the vectors received so far."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from embedding_service.engine import Embeddings, EmbedRequest, Receiver, Timings, Vectors
from embedding_service.errors import TextTooLong
from embedding_service.inference.distinct import Distinct
from embedding_service.inference.fair_queue import QueueEntry
from embedding_service.inference.tokenized import NO_FLAGS, NO_ROWS, BoolArray, IntArray, Rows, TokenizedTexts
from embedding_service.inference.vector_cache import vectors_of


@dataclass(slots=True, eq=False, kw_only=True)
class PendingRequest:
    """One request, from its arrival to its answer.

    Its texts to compute are rows of `tokenized`, from `first` on; `arrived` counts those that are tokenized,
    `missing` those without a vector. `context` is everything besides a text that affects its vector.
    """

    request: EmbedRequest
    receiver: Receiver
    number: int
    submitted: float
    prompt: str | None
    context: Hashable
    distinct: Distinct
    characters: int
    caches: bool
    missing: int
    entry: QueueEntry = None  # type: ignore[assignment]  # set right after it is made
    tokenized: TokenizedTexts | None = None
    first: int = 0
    arrived: int = 0
    # What counts as queued for it: an estimate until all of it is tokenized.
    charge: int = 0
    tokens: int = 0
    finished: bool = False
    vectors: Vectors | None = None
    tokenization_seconds: float = 0.0
    started: float = 0.0
    inference_seconds: float = 0.0
    inferred_until: float = 0.0

    @property
    def raw(self) -> bool:
        """Whether it needs the model's own vectors, to truncate them or because they stay unnormalised."""
        return self.request.dimensions is not None or not self.request.normalize

    @property
    def lengths(self) -> IntArray:
        """The tokens of each text to compute."""
        return NO_ROWS if self.tokenized is None else self.tokenized.lengths[self._mine]

    @property
    def truncated(self) -> BoolArray:
        """Whether each text to compute was cut."""
        return NO_FLAGS if self.tokenized is None else self.tokenized.truncated[self._mine]

    @property
    def _mine(self) -> slice:
        return slice(self.first, self.first + self.arrived)

    def index_of(self, row: int) -> int:
        """The index in the request of a row of `tokenized`."""
        return self.distinct.index_of(row - self.first)

    def attach(self, tokenized: TokenizedTexts, first: int, tokens: int) -> None:
        """All texts to compute are rows of these, from `first` on, with this many tokens."""
        self.tokenized, self.first, self.tokens = tokenized, first, tokens
        self.arrived = len(self.distinct.texts)

    def add(self, part: TokenizedTexts) -> None:
        """The next texts to compute are tokenized."""
        if self.tokenized is None:
            self.tokenized = part
        else:
            self.tokenized.extend(part)
        self.arrived += len(part.lengths)
        self.tokens += int(part.lengths.sum())

    def refuse_truncated(self, indices: Sequence[int], max_seq_length: int) -> None:
        """Raise TextTooLong if texts, by their index in the request, are too long and may not be cut."""
        if indices and self.request.overflow == "error":
            # In Ollama's words, by which its clients recognise this error.
            reason = f"has more than {max_seq_length} tokens: the input length exceeds the context length"
            raise TextTooLong(reason, index=min(indices))

    def receive(self, rows: IntArray, vectors: Vectors, began: float, ended: float) -> bool:
        """Store vectors of a batch that ran at this time; whether none is missing now."""
        if self.arrived == 1 and self.missing == 1:
            self.vectors = vectors
            self.inference_seconds, self.started = ended - began, began
            self.missing = 0
            return True
        if self.vectors is None:
            self.vectors = np.empty((len(self.distinct.texts), vectors.shape[1]), np.float32)
        self.vectors[rows - self.first if self.first else rows] = vectors
        self.missing -= len(vectors)
        # Overlapping batches count once.
        self.inference_seconds += max(0.0, ended - max(began, self.inferred_until))
        self.inferred_until = max(ended, self.inferred_until)
        self.started = min(self.started or began, began)
        return not self.missing

    def outcome(self, normalized: bool) -> Embeddings:
        """The answer. `normalized` says whether the model's vectors already have length 1."""
        request, distinct = self.request, self.distinct
        vectors, tokens, cut = self.vectors, self.tokens, self.truncated
        if distinct.inverse is not None:
            parts = [] if vectors is None else [vectors]
            if distinct.cached:
                cached = vectors_of(distinct.cached)
                parts.append(cached if normalized or self.raw else normalize(cached))
            vectors = np.concatenate(parts)[distinct.inverse]
            lengths = np.append(self.lengths, [entry.tokens for entry in distinct.cached])
            tokens = int(lengths[distinct.inverse].sum())
            cut = np.append(cut, [entry.truncated for entry in distinct.cached]).astype(np.bool_)
            cut = cut[distinct.inverse]
        assert vectors is not None
        if request.dimensions is not None:
            vectors = vectors[:, : request.dimensions]
            vectors = normalize(vectors) if request.normalize else np.ascontiguousarray(vectors)
        waited = self.started - self.submitted - self.tokenization_seconds
        return Embeddings(
            vectors=vectors,
            tokens=tokens,
            truncated=cut.nonzero()[0].tolist(),
            timings=Timings(
                tokenization_ms=self.tokenization_seconds * 1e3,
                queue_ms=max(0.0, waited) * 1e3,
                inference_ms=self.inference_seconds * 1e3,
            ),
            cache_hits=distinct.hits if self.caches else None,
        )


# The rows of a request that are part of a batch.
Share = tuple[PendingRequest, IntArray]


def rows_of(shares: Sequence[Share]) -> list[Rows]:
    """A batch as the model takes it; neighbours that were tokenized together become one."""
    runs: list[tuple[TokenizedTexts | None, list[IntArray]]] = []
    for pending, rows in shares:
        if runs and runs[-1][0] is pending.tokenized:
            runs[-1][1].append(rows)
        else:
            runs.append((pending.tokenized, [rows]))
    return [
        Rows(tokenized, rows[0] if len(rows) == 1 else np.concatenate(rows))
        for tokenized, rows in runs
        if tokenized is not None
    ]


def normalize(vectors: Vectors) -> Vectors:
    """Scale rows to length 1 as torch.nn.functional.normalize does: a zero row stays zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    result: Vectors = vectors / np.maximum(norms, 1e-12)[:, None]
    return result
