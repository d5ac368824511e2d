"""Rejects requests over the limits before they are queued."""

from embedding_service.engine import ModelInfo, check_characters
from embedding_service.errors import InvalidRequest, TooLarge
from embedding_service.web.context import context
from embedding_service.web.request import current

EMPTY = "is empty; send at least one text"


def max_tokens(info: ModelInfo) -> int:
    """The maximum number of tokens that the model reads of a text.

    If it does not truncate texts, MAX_TEXT_CHARACTERS is the only limit.
    """
    return context().settings.max_text_characters if info.reads_whole_texts else info.max_seq_length


def check_texts(texts: list[str], *, characters: bool = True) -> None:
    """Raises InvalidRequest if there are no texts, and TooLarge if there are too many.

    It also raises TooLarge if one has too many `characters`.
    """
    request = current()
    settings, request.texts = request.service.settings, len(texts)
    if not texts:
        raise InvalidRequest(EMPTY, field="texts")
    if len(texts) > settings.max_texts_per_request:
        raise TooLarge(
            f"has {len(texts)} texts; at most {settings.max_texts_per_request} are allowed "
            "(MAX_TEXTS_PER_REQUEST)",
            field="texts",
        )
    if characters:
        check_characters(texts, settings.max_text_characters)
