"""Token ids in place of texts: the model's own, or if TOKEN_IDS names one, of a vocabulary of OpenAI's."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from msgspec import Meta

from embedding_service.engine import Text, TokenIds
from embedding_service.errors import InvalidRequest, StartupError
from embedding_service.web.protocol import EMPTY

Inputs = Annotated[
    str | list[str | list[int] | int],
    Meta(description="One or more texts, or lists of their token ids.", examples=[["hello", "world"]]),
]
IdLists = Annotated[list[int | list[int]], Meta(examples=[[101, 7592, 102]])]
# One more than the largest id that a tokenizer may have.
ID_LIMIT = 1 << 32

Decode = Callable[[Sequence[Text]], Sequence[Text]]


def texts_of(sent: Any) -> list[Text]:
    """The texts of `Inputs`, the ids of each as a tuple; a list of nothing but ids is one text.

    Raises InvalidRequest.
    """
    if isinstance(sent, str):
        return [sent]
    kinds = set(map(type, sent))
    if int in kinds:
        if len(kinds) > 1:
            raise InvalidRequest(
                "mixes token ids with texts; put the ids of each text in a list", field="texts"
            )
        sent = [sent]
    return sent if kinds == {str} else [_text(each, index) for index, each in enumerate(sent)]


def _text(sent: str | list[int], index: int) -> Text:
    if isinstance(sent, str):
        return sent
    if not sent:
        raise InvalidRequest(EMPTY, index=index)
    if wrong := [each for each in sent if not 0 <= each < ID_LIMIT]:
        raise InvalidRequest(f"holds {wrong[0]}, which is not a token id", index=index)
    return tuple(sent)


def decoder(name: str) -> Decode:
    """Decodes the ids among texts. Raises StartupError if the package that it needs is not installed."""
    if name == "model":
        return lambda texts: texts
    try:
        import bpe_openai
    except ImportError:
        raise StartupError(
            f"TOKEN_IDS={name} needs the package bpe-openai: pip install 'embedding-service[token-ids]'"
        ) from None
    encoding: Any = bpe_openai.get_encoding(name)

    def decode(texts: Sequence[Text]) -> list[Text]:
        return [each if isinstance(each, str) else text(each, index) for index, each in enumerate(texts)]

    def text(ids: TokenIds, index: int) -> str:
        try:
            # A client that cuts a text by tokens may cut a character in two.
            return str(encoding.decode_bytes(list(ids)).decode(errors="replace"))
        except KeyError:
            raise InvalidRequest(
                f"holds an id that the vocabulary {name} does not have", index=index
            ) from None

    return decode
