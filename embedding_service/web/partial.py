"""One bad text does not fail the others: the vectors of the good ones, and the errors of the rest."""

from collections.abc import Callable

import msgspec
import numpy as np

from embedding_service.engine import Embeddings, EmbedRequest, Timings
from embedding_service.errors import ServiceError


def embed_good_ones(
    embed: Callable[[EmbedRequest], Embeddings], request: EmbedRequest, dimension: int
) -> tuple[Embeddings, dict[int, ServiceError]]:
    """The vectors of the texts that can be embedded, NaN for the others, and the others' errors by index.

    `dimension` is that of the vectors if there is not one good text.
    Texts are embedded together until one fails; then those before it, and the two halves of those
    after it. So a few bad texts cost a few more requests, and many cost no more than a logarithm.
    Raises an error that is not about one text.
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
