"""Requests that take several passes through the batcher: long texts in pieces, and bad texts left out."""

from collections.abc import Callable

import msgspec
import numpy as np

from embedding_service.engine import (
    Chunk,
    Embeddings,
    EmbedRequest,
    TextError,
    Timings,
    Vectors,
    check_characters,
)
from embedding_service.errors import ServiceError, TooLarge
from embedding_service.observability import metrics

Embed = Callable[[EmbedRequest], Embeddings]
Split = Callable[[EmbedRequest], list[list[Chunk]]]


def takes_passes(request: EmbedRequest) -> bool:
    """Whether the request needs what this module does."""
    return request.overflow in ("mean", "chunks") or request.on_error == "null"


def embed_in_passes(request: EmbedRequest, embed: Embed, split: Split, dimension: int) -> Embeddings:
    """Answer the request by requests that need none of this module, each with some of its texts or pieces.

    If a text fails, the texts before it and the two halves of those after it are embedded separately, so each
    bad text costs at most three more requests, and a text is sent about log2(n) times at most. Raises errors
    that are not about a single text. `dimension` is the length of the vectors if no text is good.
    """
    if request.on_error == "fail":
        return _embed(request, embed, split)
    errors: list[TextError] = []
    results: list[tuple[range, Embeddings]] = []
    waiting = [range(len(request.texts))]
    while waiting:
        part = waiting.pop()
        texts = request.texts[part.start : part.stop]
        try:
            if request.max_characters is not None:
                check_characters(texts, request.max_characters)
            some = msgspec.structs.replace(request, texts=texts, on_error="fail")
            results.append((part, _embed(some, embed, split)))
        except ServiceError as error:
            if error.index is None:
                raise
            bad = part[error.index]
            errors.append(TextError(bad, error.error_type, error.reason))
            middle = (bad + 1 + part.stop) // 2
            halves = (range(part.start, bad), range(bad + 1, middle), range(middle, part.stop))
            waiting += [half for half in halves if half]
    if errors:
        metrics.FAILED_TEXTS.inc(len(errors))
    results.sort(key=lambda result: result[0].start)
    errors.sort(key=lambda error: error.index)
    return _joined(request, results, errors, dimension)


def _embed(request: EmbedRequest, embed: Embed, split: Split) -> Embeddings:
    """Embed the texts, in pieces if the request asks for it. Raises TooLarge for too many pieces."""
    if request.overflow not in ("mean", "chunks"):
        return embed(request)
    chunks = split(request)
    count = sum(map(len, chunks))
    if request.max_chunks is not None and count > request.max_chunks:
        raise TooLarge(
            f"make {count} pieces of the length that the model reads; "
            f"at most {request.max_chunks} are allowed",
            field="texts",
        )
    pieces = [
        text[chunk.start : chunk.stop]
        for text, own in zip(request.texts, chunks, strict=True)
        for chunk in own
    ]
    owners = [index for index, own in enumerate(chunks) for _ in own]
    try:
        result = embed(msgspec.structs.replace(request, texts=pieces, overflow="truncate"))
    except ServiceError as error:
        if error.index is not None:
            error.index = owners[error.index]
        raise
    if pieces_of_long := sum(len(own) for own in chunks if len(own) > 1):
        metrics.CHUNKS.inc(pieces_of_long)
    vectors = result.vectors
    if request.overflow == "mean" and count > len(chunks):
        vectors = means(vectors, chunks, request.normalize)
    # A piece is truncated only if the model's own preprocessing makes more tokens than its tokenizer does.
    truncated = sorted({owners[index] for index in result.truncated})
    return msgspec.structs.replace(result, vectors=vectors, truncated=truncated, chunks=chunks)


def means(vectors: Vectors, chunks: list[list[Chunk]], normalize: bool) -> Vectors:
    """The weighted mean of each text's vectors; a text with one piece keeps its vector unchanged."""
    rows = np.empty((len(chunks), vectors.shape[1]), np.float32)
    first = 0
    for row, own in enumerate(chunks):
        last = first + len(own)
        if len(own) == 1:
            rows[row] = vectors[first]
        else:
            mean = np.average(vectors[first:last], axis=0, weights=[chunk.tokens for chunk in own])
            length = np.linalg.norm(mean)
            rows[row] = mean / length if normalize and length else mean
        first = last
    return rows


def _joined(
    request: EmbedRequest, results: list[tuple[range, Embeddings]], errors: list[TextError], dimension: int
) -> Embeddings:
    answers = [result for _, result in results]
    rows = sum(len(one.vectors) for one in answers)
    if request.overflow != "chunks":
        rows = len(request.texts)
    vectors = np.full((rows, answers[0].vectors.shape[1] if answers else dimension), np.nan, np.float32)
    chunks: list[list[Chunk]] = [[] for _ in request.texts]
    first = 0
    for part, one in results:
        if request.overflow != "chunks":
            first = part.start
        vectors[first : first + len(one.vectors)] = one.vectors
        first += len(one.vectors)
        if one.chunks is not None:
            chunks[part.start : part.stop] = one.chunks
    hits = [one.cache_hits for one in answers if one.cache_hits is not None]
    return Embeddings(
        vectors=vectors,
        tokens=sum(one.tokens for one in answers),
        truncated=[part[index] for part, one in results for index in one.truncated],
        timings=Timings(
            tokenization_ms=sum(one.timings.tokenization_ms for one in answers),
            queue_ms=sum(one.timings.queue_ms for one in answers),
            inference_ms=sum(one.timings.inference_ms for one in answers),
        ),
        cache_hits=sum(hits) if hits else None,
        chunks=chunks if request.overflow in ("mean", "chunks") else None,
        errors=errors,
    )
