"""Embeds texts that are too long for the model: piece by piece, or as the mean of their pieces."""

from typing import Literal, Protocol

import msgspec
import numpy as np

from embedding_service.engine import Chunk, Embeddings, EmbedRequest, SplitRequest, Vectors
from embedding_service.errors import ServiceError, TooLarge
from embedding_service.observability import metrics

Overflow = Literal["truncate", "error", "mean"]


class Splits(Protocol):
    """The part of an Engine that is used here."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        """As Engine.embed."""

    def split(self, request: SplitRequest) -> list[list[Chunk]]:
        """As Engine.split."""


def embed_chunks(
    engine: Splits, request: EmbedRequest, overlap: int, most: int
) -> tuple[Embeddings, list[list[Chunk]]]:
    """A vector for each piece of each text, in order, and the pieces of each text.

    Raises TooLarge if there are more than `most` pieces, and the engine's errors.
    """
    texts = request.texts
    chunks = engine.split(
        SplitRequest(
            texts=texts,
            deadline=request.deadline,
            prompt_name=request.prompt_name,
            input_type=request.input_type,
            prompt=request.prompt,
            overlap=overlap,
        )
    )
    count = sum(map(len, chunks))
    if count > most:
        raise TooLarge(
            f"make {count} pieces of the length that the model reads; at most {most} are allowed",
            field="texts",
        )
    pieces = [
        text[chunk.start : chunk.stop] for text, own in zip(texts, chunks, strict=True) for chunk in own
    ]
    owners = [index for index, own in enumerate(chunks) for _ in own]
    try:
        result = engine.embed(msgspec.structs.replace(request, texts=pieces, truncate=True))
    except ServiceError as error:
        if error.index is not None:
            error.index = owners[error.index]
        raise
    if pieces_of_long := sum(len(own) for own in chunks if len(own) > 1):
        metrics.CHUNKS.inc(pieces_of_long)
    # A piece is truncated only if the model's own preprocessing makes more tokens than its tokenizer does.
    truncated = sorted({owners[index] for index in result.truncated})
    return msgspec.structs.replace(result, truncated=truncated, chunks=count), chunks


def embed_means(engine: Splits, request: EmbedRequest, overlap: int, most: int) -> Embeddings:
    """A vector for each text: the mean of its pieces, weighted by tokens. Raises as `embed_chunks` does."""
    result, chunks = embed_chunks(engine, request, overlap, most)
    if result.chunks == len(chunks):
        return result
    return msgspec.structs.replace(result, vectors=means(result.vectors, chunks, request.normalize))


def means(vectors: Vectors, chunks: list[list[Chunk]], normalize: bool) -> Vectors:
    """The weighted mean of each text's vectors; a text with one piece keeps its vector unchanged."""
    found = np.empty((len(chunks), vectors.shape[1]), np.float32)
    first = 0
    for row, own in enumerate(chunks):
        last = first + len(own)
        if len(own) == 1:
            found[row] = vectors[first]
        else:
            mean = np.average(vectors[first:last], axis=0, weights=[chunk.tokens for chunk in own])
            length = np.linalg.norm(mean)
            found[row] = mean / length if normalize and length else mean
        first = last
    return found
