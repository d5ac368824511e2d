"""Vectors of tokens, for uses such as late interaction: POST /embed_all, and `output: tokens` on /embed."""

from collections.abc import Iterator

from embedding_service.engine import TokensRequest, Vectors
from embedding_service.web.context import context
from embedding_service.web.limits import check_texts


def ask_tokens(request: TokensRequest) -> list[Vectors]:
    """The vectors of each text's tokens. Raises TooLarge if there could be too many."""
    check_texts(request.texts)
    found = context().embed_tokens(request)
    return list(_by_text(found.vectors, found.counts))


def _by_text(vectors: Vectors, counts: list[int]) -> Iterator[Vectors]:
    first = 0
    for count in counts:
        yield vectors[first : first + count]
        first += count
