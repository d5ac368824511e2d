"""OpenAI: POST /v1/embeddings (and /embeddings), GET /v1/models and /v1/models/{id}."""

import time
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service.engine import EmbedRequest
from embedding_service.errors import InvalidRequest, NotFound, Unavailable
from embedding_service.quantization import Precision
from embedding_service.web.body import BodyDecoder, answer, read
from embedding_service.web.context import context
from embedding_service.web.embedding import (
    ChunkOverlap,
    Dimensions,
    EncodedVector,
    EncodingFormat,
    InputType,
    OverflowField,
    Priority,
    Prompt,
    PromptName,
    answer_embeddings,
    ask,
    encoded,
    in_precision,
    model_name,
    overflow_of,
)
from embedding_service.web.operation import operation
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.request import current

STARTED = int(time.time())

# OpenAI's codes for the errors that have one.
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
CODES = {
    "unauthorized": "invalid_api_key",
    "not_found": "not_found",
    "fingerprint_mismatch": "fingerprint_mismatch",
    "overloaded": "rate_limit_exceeded",
    "timeout": "timeout",
    "unavailable": "service_unavailable",
}


class OpenAIError(TypedDict):
    """The error."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(TypedDict):
    """An error in OpenAI's format, with its message in `detail` for Voyage's SDK."""

    error: OpenAIError
    detail: str


def render(failure: Failure) -> tuple[OpenAIErrorAnswer, int]:
    """OpenAI's error; its SDK chooses the exception class by status, and shows the message."""
    kind = TYPES.get(failure.status, "server_error" if failure.status >= 500 else "invalid_request_error")
    error: OpenAIError = {
        "message": failure.message,
        "type": kind,
        "param": failure.field,
        "code": CODES.get(failure.error_type),
    }
    return {"error": error, "detail": failure.message}, failure.status


protocol = ApiProtocol(
    "openai",
    "OpenAI",
    render,
    OpenAIErrorAnswer,
    paths=("/v1/", "/embeddings"),
    names={"texts": "input"},
)


# Voyage's and Jina's names for the number formats. Neither has float16, whose name follows the others.
PRECISIONS: dict[str, Precision] = {
    "float16": "float16",
    "int8": "int8",
    "uint8": "uint8",
    "binary": "binary",
    "ubinary": "ubinary",
}
OutputDtype = Annotated[
    Literal["float", "float32", "float16", "int8", "uint8", "binary", "ubinary"],
    Meta(description="Voyage's name for the number format of the vectors; see `precision` of /embed."),
]
EmbeddingType = Annotated[
    Literal["float", "base64", "binary", "ubinary"],
    Meta(description="Jina's name for the number format or encoding of the vectors."),
]
# Jina's names for the two sides of a search.
SIDES: dict[str, Literal["query", "document"]] = {"query": "query", "passage": "document"}
TASKS: dict[str, Literal["query", "document"]] = {
    f"{kind}.{side}": meant
    for kind in ("retrieval", "code", "nl2code", "code2code", "code2nl", "code2completion", "qa")
    for side, meant in SIDES.items()
}


class JinaInput(msgspec.Struct, frozen=True):
    """A text, as Jina's API takes it."""

    text: str | None = None
    image: Annotated[Any, Meta(description="Not supported: the model reads text.")] = None


class OpenAIEmbedBody(msgspec.Struct, frozen=True):
    """Texts to embed."""

    input: Annotated[
        str | list[str | JinaInput], Meta(description="One or more texts.", examples=[["hello", "world"]])
    ]
    model: (
        Annotated[str, Meta(description="Any name; there is only one model, and the response names it.")]
        | None
    ) = None
    encoding_format: EncodingFormat | None = None
    dimensions: Dimensions | None = None
    user: Annotated[str, Meta(description="Not used.")] | None = None
    input_type: InputType | None = None
    prompt: Prompt | None = None
    prompt_name: PromptName | None = None
    output_dimension: Annotated[Dimensions, Meta(description="Voyage's name for dimensions.")] | None = None
    output_dtype: OutputDtype | None = None
    embedding_type: EmbeddingType | None = None
    task: (
        Annotated[
            Literal[
                "retrieval.query",
                "retrieval.passage",
                "code.query",
                "code.passage",
                "nl2code.query",
                "nl2code.passage",
                "code2code.query",
                "code2code.passage",
                "code2nl.query",
                "code2nl.passage",
                "code2completion.query",
                "code2completion.passage",
                "qa.query",
                "qa.passage",
                "text-matching",
                "classification",
                "clustering",
                "separation",
            ],
            Meta(description="Jina's way to choose the model's own prompt for queries or documents."),
        ]
        | None
    ) = None
    truncation: Annotated[bool, Meta(description="Truncate over-long texts; false rejects them.")] | None = (
        None
    )
    priority: Priority | None = "normal"
    overflow: OverflowField | None = None
    chunk_overlap: ChunkOverlap | None = 0


class TokenIdsBody(msgspec.Struct, frozen=True):
    """The body of clients that tokenize texts themselves, with the vocabulary of an OpenAI model."""

    input: list[int | list[int]]


class OpenAIEmbedding(TypedDict):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: EncodedVector


class OpenAIUsage(TypedDict):
    """What the model read."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbedAnswer(TypedDict):
    """The embeddings, in the order of the texts."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(TypedDict):
    """A model that can be used."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(TypedDict):
    """All models, which is one."""

    object: Literal["list"]
    data: list[OpenAIModel]


_decoder = BodyDecoder(OpenAIEmbedBody)
_token_ids_decoder = msgspec.json.Decoder(TokenIdsBody)


@protocol.post("/v1/embeddings")
@protocol.post("/embeddings")
@operation({200: OpenAIEmbedAnswer}, body=_decoder, embeds=True)
def embeddings() -> Response:
    """Embed one or more texts, as vectors of length 1."""
    body = _parse()
    result = ask(
        EmbedRequest(
            texts=_texts(body.input),
            deadline=current().deadline,
            input_type=body.input_type or TASKS.get(body.task or ""),
            prompt=body.prompt,
            prompt_name=body.prompt_name,
            priority=body.priority or "normal",
            dimensions=body.output_dimension if body.dimensions is None else body.dimensions,
            overflow=overflow_of(body.overflow, body.truncation, "truncation"),
            overlap=body.chunk_overlap or 0,
        )
    )
    if body.output_dtype is not None and body.embedding_type is not None:
        raise InvalidRequest("cannot be sent together with output_dtype", field="embedding_type")
    precision = PRECISIONS.get(body.output_dtype or body.embedding_type or "float")
    numbers = in_precision(result.vectors, precision, field="output_dtype")
    encoding = body.encoding_format or ("base64" if body.embedding_type == "base64" else "float")
    vectors = encoded(numbers, encoding)
    data: list[OpenAIEmbedding] = [
        {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
    ]
    usage: OpenAIUsage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    found: OpenAIEmbedAnswer = {"object": "list", "data": data, "model": model_name(), "usage": usage}
    return answer_embeddings(found, result)


@protocol.get("/v1/models")
@operation({200: OpenAIModels}, raises=(Unavailable,))
def models() -> Response:
    """List the model."""
    found: OpenAIModels = {"object": "list", "data": [_model()]}
    return answer(found)


@protocol.get("/v1/models/<path:name>")
@operation({200: OpenAIModel}, raises=(Unavailable, NotFound))
def model(name: str) -> Response:
    """Describe the model; any other name is not found."""
    found = _model()
    if name.strip("/") not in (found["id"].strip("/"), *context().names):
        raise NotFound(f"there is no model {name!r}; the model is {found['id']!r}")
    return answer(found)


def _model() -> OpenAIModel:
    info = context().require_info()
    return {"id": info.model_name, "object": "model", "created": STARTED, "owned_by": "embedding-service"}


def _texts(sent: str | list[str | JinaInput]) -> list[str]:
    if isinstance(sent, str):
        return [sent]
    return [each if isinstance(each, str) else _text_of(each, index) for index, each in enumerate(sent)]


def _text_of(sent: JinaInput, index: int) -> str:
    if sent.image is not None:
        raise InvalidRequest("holds an image; the model reads text", field="input", index=index)
    if sent.text is None:
        raise InvalidRequest("holds no text", field="input", index=index)
    return sent.text


def _parse() -> OpenAIEmbedBody:
    raw = read()
    try:
        return _decoder.decode(raw)
    except InvalidRequest:
        if _has_token_ids(raw):
            raise InvalidRequest(
                "holds token ids from another model's vocabulary; send texts "
                "(in LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False)",
                field="input",
            ) from None
        raise


def _has_token_ids(raw: bytes) -> bool:
    try:
        ids: list[Any] = _token_ids_decoder.decode(raw).input
    except (msgspec.MsgspecError, RecursionError):
        return False
    return bool(ids)
