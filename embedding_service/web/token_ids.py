"""Decodes token ids of OpenAI's vocabularies into the text that they came from, if TOKEN_IDS is set."""

from collections.abc import Callable, Sequence
from typing import Any

from embedding_service.errors import InvalidRequest, StartupError

Decode = Callable[[Sequence[list[int]]], list[str]]


def decoder(name: str) -> Decode:
    """Texts from lists of ids. Raises StartupError if the package with the vocabularies is not installed."""
    try:
        import bpe_openai
    except ImportError:
        raise StartupError(
            f"TOKEN_IDS={name} needs the package bpe-openai: pip install 'embedding-service[token-ids]'"
        ) from None
    encoding: Any = bpe_openai.get_encoding(name)

    def decode(lists: Sequence[list[int]]) -> list[str]:
        return [text(ids, index) for index, ids in enumerate(lists)]

    def text(ids: list[int], index: int) -> str:
        try:
            # The package takes a negative id for one from the end.
            if ids and min(ids) < 0:
                raise KeyError
            # A client that cuts a text by tokens may cut a character in two.
            return str(encoding.decode_bytes(ids).decode(errors="replace"))
        except (KeyError, OverflowError):
            raise InvalidRequest(
                f"holds an id that the vocabulary {name} does not have", field="input", index=index
            ) from None

    return decode
