"""Vectors of tokens, for uses such as late interaction: POST /embed_all, and `output: tokens` on /embed."""

from collections.abc import Iterator
from typing import Annotated, Any

from flask import Response
from msgspec import Meta

from embedding_service.engine import TokenVectorsRequest, Vectors
from embedding_service.web.body import answer
from embedding_service.web.context import context
from embedding_service.web.embedding import MATRIX, add_headers, check_fingerprint
from embedding_service.web.limits import check_texts
from embedding_service.web.request import current

Matrices = Annotated[Any, Meta(description="float32", extra_json_schema={"type": "array", "items": MATRIX})]


def ask_tokens(request: TokenVectorsRequest) -> list[Vectors]:
    """The vectors of each text's tokens. Raises TooLarge if there could be too many."""
    check_fingerprint()
    check_texts(request.texts)
    found = context().call(request)
    current().tokens = sum(found.counts)
    return list(_by_text(found.vectors, found.counts))


def answer_tokens(body: Any) -> Response:
    """The body, with the headers of Text Embeddings Inference that have values: tokens and total time."""
    return add_headers(answer(body))


def _by_text(vectors: Vectors, counts: list[int]) -> Iterator[Vectors]:
    first = 0
    for count in counts:
        yield vectors[first : first + count]
        first += count
