"""Embeds the good texts of a request and returns the errors of the bad ones, instead of failing."""

from collections.abc import Callable

import msgspec
import numpy as np

from embedding_service.engine import Embeddings, EmbedRequest, Timings
from embedding_service.errors import ServiceError
from embedding_service.observability import metrics


def embed_good_ones(
    embed: Callable[[EmbedRequest], Embeddings], request: EmbedRequest, dimension: int
) -> tuple[Embeddings, dict[int, ServiceError]]:
    """The vectors of the texts, NaN for bad ones, and the errors of the bad ones by index.

    `dimension` is the length of the vectors if no text is good. If a text fails, the texts before it and the
    two halves of those after it are embedded separately, so each bad text costs at most three more requests,
    and a text is sent about log2(n) times at most. Raises errors that are not about a single text.
    """
    errors: dict[int, ServiceError] = {}
    results: list[tuple[range, Embeddings]] = []
    waiting = [range(len(request.texts))]
    while waiting:
        part = waiting.pop()
        try:
            texts = request.texts[part.start : part.stop]
            results.append((part, embed(msgspec.structs.replace(request, texts=texts))))
        except ServiceError as error:
            if error.index is None:
                raise
            bad = part[error.index]
            errors[bad] = error
            middle = (bad + 1 + part.stop) // 2
            halves = (range(part.start, bad), range(bad + 1, middle), range(middle, part.stop))
            waiting += [half for half in halves if half]
    if errors:
        metrics.FAILED_TEXTS.inc(len(errors))
    return _joined(results, len(request.texts), dimension), errors


def _joined(results: list[tuple[range, Embeddings]], count: int, dimension: int) -> Embeddings:
    if results:
        dimension = results[0][1].vectors.shape[1]
    vectors = np.full((count, dimension), np.nan, np.float32)
    for part, result in results:
        vectors[part.start : part.stop] = result.vectors
    found = [result for _, result in results]
    hits = [result.cache_hits for result in found if result.cache_hits is not None]
    chunks = [result.chunks for result in found if result.chunks is not None]
    return Embeddings(
        vectors=vectors,
        tokens=sum(result.tokens for result in found),
        truncated=sorted(part[index] for part, result in results for index in result.truncated),
        timings=Timings(
            tokenization_ms=sum(result.timings.tokenization_ms for result in found),
            queue_ms=sum(result.timings.queue_ms for result in found),
            inference_ms=sum(result.timings.inference_ms for result in found),
        ),
        cache_hits=sum(hits) if hits else None,
        chunks=sum(chunks) if chunks else None,
    )
