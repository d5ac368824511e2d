"""Refusing what is too much before it is queued."""

from embedding_service.errors import InvalidRequest, TooLarge
from embedding_service.web.context import context


def check_texts(texts: list[str], name: str = "texts") -> None:
    """Raises InvalidRequest for no texts, TooLarge for too many or too long ones."""
    settings = context().settings
    if not texts:
        raise InvalidRequest(f"{name} is empty; send at least one text")
    if len(texts) > settings.max_texts_per_request:
        raise TooLarge(f"{name} has {len(texts)} texts; at most {settings.max_texts_per_request} are allowed")
    if len(max(texts, key=len)) > settings.max_text_characters:
        index = next(i for i, t in enumerate(texts) if len(t) > settings.max_text_characters)
        raise TooLarge(
            f"{name}[{index}] has {len(texts[index])} characters; "
            f"at most {settings.max_text_characters} are allowed"
        )
