"""POST /embed: the service's own API."""

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from flask import Response
from msgspec import UNSET, Meta, Raw, UnsetType

from embedding_service.engine import Embeddings, EmbedRequest
from embedding_service.errors import InvalidRequest
from embedding_service.web.body import BodyDecoder, read
from embedding_service.web.embedding import (
    NPY,
    Dimensions,
    EncodedVectors,
    EncodingFormat,
    InputType,
    PrecisionField,
    PromptName,
    answer_embeddings,
    answer_npy,
    ask,
    encoded,
    in_precision,
    listed,
    model_name,
    wants_npy,
)
from embedding_service.web.operation import JSON, operation
from embedding_service.web.protocol import Failure, Protocol, set_protocol
from embedding_service.web.protocols import tei
from embedding_service.web.request import current, current_id


class ErrorAnswer(TypedDict):
    """An error: a sentence for a person, and a word for a program."""

    error: str
    error_type: str
    request_id: str | None
    field: NotRequired[Annotated[str, Meta(description="The field that the error is about.")]]
    index: NotRequired[Annotated[int, Meta(description="The item of that field.")]]
    reason: NotRequired[Annotated[str, Meta(description="The error without the field and the item.")]]


def render(failure: Failure) -> tuple[ErrorAnswer, int]:
    """The native protocol's error."""
    body: ErrorAnswer = {
        "error": failure.message,
        "error_type": failure.error_type,
        "request_id": current_id(),
    }
    if failure.field is not None:
        body["field"] = failure.field
        body["reason"] = failure.reason
    if failure.index is not None:
        body["index"] = failure.index
    return body, failure.status


protocol = Protocol("native", "Embedding service", render, ErrorAnswer)


class EmbedBody(msgspec.Struct, frozen=True):
    """Texts to embed."""

    texts: Annotated[str | list[str], Meta(description="One text or many.", examples=[["hello", "world"]])]
    normalize: Annotated[bool, Meta(description="Scale each vector to length 1.")] | None = True
    prompt_name: PromptName | None = None
    input_type: InputType | None = None
    dimensions: Dimensions | None = None
    truncate: Annotated[bool, Meta(description="Cut over-long texts; false refuses them.")] | None = True
    encoding_format: EncodingFormat | None = "float"
    precision: PrecisionField | None = "float32"


class Usage(TypedDict):
    """What the model read."""

    tokens: Annotated[int, Meta(description="Tokens read, special ones and prompts included.")]
    truncated: Annotated[list[int], Meta(description="Indices of the texts that were cut.")]


class EmbedAnswer(TypedDict):
    """The embeddings, in the order of the texts."""

    embeddings: EncodedVectors
    dimension: Annotated[int, Meta(description="Dimensions of a vector, before binary packs them.")]
    model: str
    count: int
    processing_time_ms: float
    usage: Usage


class Fields(msgspec.Struct, frozen=True):
    """Which of the two fields that hold texts a body has."""

    texts: Raw | UnsetType = UNSET
    inputs: Raw | UnsetType = UNSET


_decoder = BodyDecoder(EmbedBody, near=True)
_fields_decoder = msgspec.json.Decoder(Fields)


@protocol.post("/embed")
@operation({200: EmbedAnswer}, media=(JSON, NPY), body=_decoder, embeds=True, variant=tei.embed)
def embed() -> Response:
    """Embed one text or many; a body of Text Embeddings Inference gets its bare vectors."""
    raw = read()
    try:
        body = _decoder.decode(raw)
    except InvalidRequest:
        if not _is_for_tei(raw):
            raise
        set_protocol(tei.protocol)
        return tei.embed_raw(raw)
    result = ask(
        EmbedRequest(
            texts=listed(body.texts),
            deadline=current().deadline,
            normalize=body.normalize is not False,
            prompt_name=body.prompt_name,
            input_type=body.input_type,
            dimensions=body.dimensions,
            truncate=body.truncate is not False,
        )
    )
    vectors = in_precision(result.vectors, body.precision)
    if wants_npy():
        return answer_npy(vectors, result)
    return answer_embeddings(_answer(result, encoded(vectors, body.encoding_format or "float")), result)


def _is_for_tei(raw: bytes) -> bool:
    try:
        fields = _fields_decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return _is_left_out(fields.texts) and not _is_left_out(fields.inputs)


def _is_left_out(field: Raw | UnsetType) -> bool:
    return isinstance(field, UnsetType) or bytes(field) == b"null"


def _answer(result: Embeddings, vectors: Any) -> EmbedAnswer:
    count, dimension = result.vectors.shape
    return {
        "embeddings": vectors,
        "dimension": dimension,
        "model": model_name(),
        "count": count,
        "processing_time_ms": round(current().seconds * 1e3, 2),
        "usage": {"tokens": result.tokens, "truncated": result.truncated},
    }
