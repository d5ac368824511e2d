"""Vectors of tokens, for late interaction and the like: POST /embed_all, and `output: tokens` on /embed."""

from collections.abc import Iterator

from embedding_service.engine import TokensRequest, Vectors
from embedding_service.errors import TooLarge
from embedding_service.web.context import context
from embedding_service.web.limits import check_texts

# An answer may hold this many numbers: about 40 MB of JSON.
MOST_NUMBERS = 4_000_000


def ask_tokens(request: TokensRequest) -> list[Vectors]:
    """The vectors of each text's tokens. Raises TooLarge if they could be too many."""
    check_texts(request.texts)
    info = context().require_info()
    # A token is at least a character or a byte of one, and two are special.
    tokens = sum(min(info.max_seq_length, 4 * len(text) + 2) for text in request.texts)
    if tokens * info.embedding_dimension > MOST_NUMBERS:
        raise TooLarge(
            f"could have {tokens} tokens of {info.embedding_dimension} numbers each; at most "
            f"{MOST_NUMBERS} numbers are allowed, so send fewer texts",
            field="texts",
        )
    found = context().embed_tokens(request)
    return list(_by_text(found.vectors, found.counts))


def _by_text(vectors: Vectors, counts: list[int]) -> Iterator[Vectors]:
    first = 0
    for count in counts:
        yield vectors[first : first + count]
        first += count
