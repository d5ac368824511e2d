"""Rejects requests over the limits before they are queued."""

from embedding_service.engine import ModelInfo
from embedding_service.errors import InvalidRequest, TooLarge
from embedding_service.web.context import context
from embedding_service.web.request import current


def max_tokens(info: ModelInfo) -> int:
    """The maximum number of tokens that the model reads of a text.

    If it does not truncate texts, MAX_TEXT_CHARACTERS is the only limit.
    """
    return context().settings.max_text_characters if info.reads_whole_texts else info.max_seq_length


def check_texts(texts: list[str]) -> None:
    """Raises InvalidRequest if there are no texts, and TooLarge if there are too many or one is too long."""
    settings = context().settings
    # With on_error: null, parts of the request come here again.
    current().texts = max(current().texts or 0, len(texts))
    if not texts:
        raise InvalidRequest("is empty; send at least one text", field="texts")
    if len(texts) > settings.max_texts_per_request:
        raise TooLarge(
            f"has {len(texts)} texts; at most {settings.max_texts_per_request} are allowed", field="texts"
        )
    if len(max(texts, key=len)) > settings.max_text_characters:
        index = next(i for i, t in enumerate(texts) if len(t) > settings.max_text_characters)
        raise TooLarge(
            f"has {len(texts[index])} characters; at most {settings.max_text_characters} are allowed",
            index=index,
        )
