"""A request in progress: what it asks for, its place in the queue, and the vectors received so far."""

from collections.abc import Hashable, Sequence

import msgspec
import numpy as np

from embedding_service.engine import (
    Chunk,
    Embeddings,
    EmbedRequest,
    Receiver,
    Text,
    TextError,
    Timings,
    Vectors,
)
from embedding_service.errors import ServiceError, TextTooLong
from embedding_service.inference.distinct import Distinct
from embedding_service.inference.fair_queue import QueueEntry
from embedding_service.inference.model import Model
from embedding_service.inference.tokenized import NO_FLAGS, NO_ROWS, BoolArray, IntArray, Rows, TokenizedTexts
from embedding_service.inference.vector_cache import vectors_of
from embedding_service.observability import metrics

# What is to be computed for a request before its texts are cut.
NONE = Distinct([])


class PendingRequest(msgspec.Struct, eq=False, kw_only=True):
    """One request, from its arrival to its answer.

    `texts` are those of the request, with an empty one in place of each that is bad; `errors` says why, by
    index. `chunks` are the pieces of the texts that have been cut so far, None if texts are not cut. What is
    to compute, texts or pieces, are rows of `tokenized`, from `first` on; `arrived` counts those that are
    tokenized, `missing` those without a vector. `context` is everything besides a text that affects its
    vector.
    """

    request: EmbedRequest
    receiver: Receiver
    number: int
    submitted: float
    prompt: str | None
    context: Hashable
    entry: QueueEntry
    caches: bool
    # Whether it needs the model's own vectors, to shorten them or because they stay unnormalised.
    raw: bool
    texts: list[Text]
    errors: dict[int, ServiceError] = {}
    chunks: list[list[Chunk]] | None = None
    distinct: Distinct = NONE
    characters: int = 0
    missing: int = 0
    tokenized: TokenizedTexts | None = None
    first: int = 0
    arrived: int = 0
    any_truncated: bool = False
    # What counts as queued for it: an estimate until all of it is tokenized.
    charge: int = 0
    tokens: int = 0
    admitted: bool = False
    finished: bool = False
    vectors: Vectors | None = None
    tokenization_seconds: float = 0.0
    started: float = 0.0
    inference_seconds: float = 0.0
    inferred_until: float = 0.0

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

    def refuse(self, index: int, error: ServiceError) -> None:
        """Go on without a text of the request, or raise the error if the request fails with it."""
        error.index = index
        if self.request.on_error == "fail":
            raise error
        self.errors.setdefault(index, error)
        self.texts[index] = ""

    def refuse_row(self, row: int, error: ServiceError) -> None:
        """Go on without the texts of this text to compute, or raise the error."""
        for index in self.distinct.indices_of(row):
            self.refuse(index if self.chunks is None else int(self._owners()[index]), error)

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

    def refuse_truncated(self, truncated: Sequence[bool], first: int, max_seq_length: int) -> None:
        """Note which of the texts from row `first` on are truncated; refuse those that must not be."""
        self.any_truncated = self.any_truncated or any(truncated)
        if self.request.overflow != "error":
            return
        # In Ollama's words, by which its clients recognise this error.
        reason = f"has more than {max_seq_length} tokens: the input length exceeds the context length"
        for row, cut in enumerate(truncated, first):
            if cut:
                self.refuse_row(row, TextTooLong(reason))
                self.missing -= row < len(self.distinct.texts)

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

    def outcome(self, model: Model) -> Embeddings:
        """The answer."""
        request, vectors, tokens, chunks = self.request, self.vectors, self.tokens, self.chunks
        truncated: list[int] = []
        if vectors is None or self.distinct.inverse is not None or self.errors or chunks is not None:
            vectors, tokens, truncated, chunks = self._assembled(model)
        else:
            if self.any_truncated:
                truncated = self.truncated.nonzero()[0].tolist()
            if request.dimensions is not None:
                vectors = shortened(vectors, request)
        waited = self.started - self.submitted - self.tokenization_seconds
        return Embeddings(
            vectors=vectors,
            tokens=tokens,
            truncated=truncated,
            timings=Timings(
                tokenization_ms=self.tokenization_seconds * 1e3,
                queue_ms=max(0.0, waited) * 1e3,
                inference_ms=self.inference_seconds * 1e3,
            ),
            cache_hits=self.distinct.hits if self.caches else None,
            chunks=chunks,
            errors=[
                TextError(index, error.error_type, error.reason)
                for index, error in sorted(self.errors.items())
            ]
            if self.errors
            else [],
        )

    def _assembled(self, model: Model) -> tuple[Vectors, int, list[int], list[list[Chunk]] | None]:
        """Vectors, tokens, truncated texts and pieces, if the rows are not simply the request's texts."""
        vectors, own, lengths, cut = self.vectors, self.distinct, self.lengths, self.truncated
        if vectors is None:
            vectors = np.full((len(own.texts), model.info.embedding_dimension), np.nan, np.float32)
        if own.cached:
            cached = vectors_of(own.cached)
            vectors = np.concatenate((vectors, cached if model.normalized or self.raw else normalize(cached)))
            lengths = np.append(lengths, [entry.tokens for entry in own.cached])
            cut = np.append(cut, [entry.truncated for entry in own.cached]).astype(np.bool_)
        if own.inverse is not None:
            vectors, lengths, cut = vectors[own.inverse], lengths[own.inverse], cut[own.inverse]
        vectors = shortened(vectors, self.request)
        good = np.ones(len(self.texts), np.bool_)
        good[list(self.errors)] = False
        if self.errors:
            metrics.FAILED_TEXTS.inc(len(self.errors))
        owners = self._owners()
        kept, chunks = good[owners], self.chunks
        if chunks is not None:
            chunks = [pieces if fine else [] for pieces, fine in zip(chunks, good.tolist(), strict=True)]
            if of_long := sum(len(pieces) for pieces in chunks if len(pieces) > 1):
                metrics.CHUNKS.inc(of_long)
            vectors = vectors[kept]
            if self.request.overflow == "mean":
                means = means_of(vectors, chunks, self.request.normalize)
                vectors = np.full((len(good), vectors.shape[1]), np.nan, np.float32)
                vectors[good] = means
        elif self.errors:
            vectors = np.where(good[:, None], vectors, np.float32(np.nan))
        # A piece is truncated only if the model's own preprocessing makes more tokens than its tokenizer.
        truncated = np.unique(owners[cut & kept]).tolist()
        return vectors, int(lengths[kept].sum()), truncated, chunks

    def _owners(self) -> IntArray:
        """The text of each piece."""
        indices = np.arange(len(self.texts), dtype=np.int32)
        return indices if self.chunks is None else indices.repeat([len(pieces) for pieces in self.chunks])


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


def shortened(vectors: Vectors, request: EmbedRequest) -> Vectors:
    """The dimensions that the request asks for."""
    if request.dimensions is None:
        return vectors
    vectors = vectors[:, : request.dimensions]
    return normalize(vectors) if request.normalize else np.ascontiguousarray(vectors)


def means_of(vectors: Vectors, chunks: Sequence[list[Chunk]], normalize: bool) -> Vectors:
    """The weighted mean of each text's vectors, unchanged if it has one piece; no row if it has none."""
    rows, first = [], 0
    for pieces in filter(None, chunks):
        own = vectors[first : first + len(pieces)]
        first += len(pieces)
        if len(own) > 1:
            mean = np.average(own, axis=0, weights=[piece.tokens for piece in pieces])
            length = np.linalg.norm(mean)
            own = (mean / length if normalize and length else mean)[None]
        rows.append(own)
    return np.concatenate(rows or [vectors]).astype(np.float32, copy=False)
