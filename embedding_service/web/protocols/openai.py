"""OpenAI, and those that follow it: POST /v1/embeddings, GET /v1/models, and their other addresses."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service.engine import Text
from embedding_service.errors import InvalidRequest, Unavailable
from embedding_service.web.body import BodyDecoder, read, try_decode
from embedding_service.web.context import current
from embedding_service.web.options import Dimensions, Options, Prompt, embed
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.responses import (
    EncodedVector,
    EncodingFormat,
    answer,
    encoded,
    vector_headers,
)
from embedding_service.web.route_spec import RouteSpec, shape
from embedding_service.web.token_ids import Inputs, texts_of

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


OpenAIError = shape("OpenAIError", "The error.", message=str, type=str, param=str | None, code=str | None)
OpenAIErrorAnswer = shape(
    "OpenAIErrorAnswer",
    "An error in OpenAI's format, with its message in `detail` for Voyage's SDK.",
    error=OpenAIError,
    detail=str,
)


def render(failure: Failure) -> tuple[dict[str, Any], int]:
    """OpenAI's error; its SDK chooses the exception class by status, and shows the message."""
    kind = TYPES.get(failure.status, "server_error" if failure.status >= 500 else "invalid_request_error")
    error = {
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
    paths=("/v1", "/embeddings", "/models", "/openai", "/api/v0", "/chat", "/completions"),
    names={"texts": "input"},
)


JinaCode = Literal["code.query", "code.passage", "nl2code.query", "nl2code.passage", "code2code.query"]
JinaMoreCode = Literal["code2code.passage", "code2nl.query", "code2nl.passage", "code2completion.query"]
JinaText = Literal["retrieval.query", "retrieval.passage", "qa.query", "qa.passage", "text-matching"]
JinaTask = Literal[
    JinaCode, JinaMoreCode, "code2completion.passage", JinaText, "classification", "clustering", "separation"
]


class JinaInput(msgspec.Struct, frozen=True):
    """A text, as Jina's API takes it."""

    text: str | None = None
    image: Any = None


class OpenAIEmbedBody(Options, frozen=True, kw_only=True):
    """Texts to embed."""

    input: Annotated[
        str | list[str | JinaInput], Meta(description="One or more texts.", examples=[["hello", "world"]])
    ]
    model: str | None = None
    encoding_format: EncodingFormat | None = None
    user: str | None = None
    prompt: Prompt | None = None
    output_dimension: Dimensions | None = None
    output_dtype: Literal["float", "float32", "float16", "int8", "uint8", "binary", "ubinary"] | None = None
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = None
    normalized: bool | None = None
    task: JinaTask | None = None
    truncation: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None


class TokenIdsBody(msgspec.Struct, frozen=True):
    """The body of clients that tokenize texts themselves."""

    input: Inputs


OpenAIEmbedding = shape(
    "OpenAIEmbedding", "One vector.", object=Literal["embedding"], index=int, embedding=EncodedVector
)
OpenAIUsage = shape("OpenAIUsage", "What the model read.", prompt_tokens=int, total_tokens=int)
OpenAIEmbedAnswer = shape(
    "OpenAIEmbedAnswer",
    "The embeddings, in the order of the texts.",
    id=str,
    object=Literal["list"],
    data=[OpenAIEmbedding],
    model=str,
    usage=OpenAIUsage,
)
OpenAIModel = shape(
    "OpenAIModel", "A model that can be used.", id=str, object=Literal["model"], created=int, owned_by=str
)
CohereModel = shape(
    "CohereModel",
    "The model, as Cohere's clients read it from the same route.",
    name=str,
    endpoints=list[Literal["embed"]],
)
OpenAIModels = shape(
    "OpenAIModels",
    "All models, which is one; `models` is for Cohere's clients.",
    object=Literal["list"],
    data=[OpenAIModel],
    models=[CohereModel],
)
LMStudioModel = shape(
    "LMStudioModel",
    "The model, as LM Studio's clients read it.",
    id=str,
    object=Literal["model"],
    type=Literal["embeddings"],
    publisher=str,
    arch=str,
    compatibility_type=str,
    quantization=str,
    state=Literal["loaded"],
    max_context_length=int,
)
LMStudioModels = shape(
    "LMStudioModels", "All models, which is one.", object=Literal["list"], data=[LMStudioModel]
)


_decoder = BodyDecoder(OpenAIEmbedBody)
_token_ids_decoder = msgspec.json.Decoder(TokenIdsBody)


@protocol.post("/v1/embeddings")
@protocol.post("/embeddings")
@protocol.post("/openai/deployments/<path:name>/embeddings")
@protocol.post("/openai/v1/embeddings")
@RouteSpec({200: OpenAIEmbedAnswer}, body=_decoder, embeds=True)
def embeddings(name: str = "") -> Response:
    """Embed one or more texts, as vectors of length 1. Azure's clients name the model in the path."""
    body, texts = _parse()
    result = embed(texts, body, advice='"truncation": true')
    if body.output_dtype is not None and body.embedding_type is not None:
        raise InvalidRequest("cannot be sent together with output_dtype", field="embedding_type")
    field = "output_dtype" if body.embedding_type is None else "embedding_type"
    as_base64 = (body.encoding_format or body.embedding_type) == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(
            encoded(result.vectors, getattr(body, field), as_base64=as_base64, field=field)
        )
    ]
    found = {
        "id": current().id,
        "object": "list",
        "data": data,
        "model": current().service.model_name,
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
    }
    return answer(found, headers=vector_headers())


@protocol.get("/v1/models")
@protocol.get("/models")
@protocol.get("/v1")
@protocol.get("/openai/v1/models")
@RouteSpec({200: OpenAIModels}, raises=(Unavailable,))
def models() -> Response:
    """List the model."""
    one = _model()
    found = {
        "object": "list",
        "data": [one],
        "models": [{"name": one["id"], "endpoints": ["embed"]}],
    }
    return answer(found)


@protocol.get("/v1/models/<path:name>")
@protocol.get("/models/<path:name>")
@RouteSpec({200: OpenAIModel}, raises=(Unavailable,))
def model(name: str) -> Response:
    """Describe the model, which serves every name; the response has its own."""
    return answer(_model())


@protocol.get("/api/v0/models")
@RouteSpec({200: LMStudioModels}, raises=(Unavailable,))
def lm_studio_models() -> Response:
    """List the model, in LM Studio's form."""
    return answer({"object": "list", "data": [_lm_studio_model()]})


@protocol.get("/api/v0/models/<path:name>")
@RouteSpec({200: LMStudioModel}, raises=(Unavailable,))
def lm_studio_model(name: str) -> Response:
    """Describe the model, in LM Studio's form."""
    return answer(_lm_studio_model())


def _lm_studio_model() -> dict[str, Any]:
    info = current().service.require_info()
    return {
        "id": info.model_name,
        "object": "model",
        "type": "embeddings",
        "publisher": info.model_name.rpartition("/")[0],
        "arch": info.architecture,
        "compatibility_type": "safetensors",
        "quantization": info.dtype,
        "state": "loaded",
        "max_context_length": current().service.max_tokens(info),
    }


def _model() -> dict[str, Any]:
    info = current().service.require_info()
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


def _parse() -> tuple[OpenAIEmbedBody, Sequence[Text]]:
    raw = read()
    try:
        body = _decoder.decode(raw)
    except InvalidRequest:
        sent = try_decode(_token_ids_decoder, raw)
        texts = texts_of(sent.input) if sent else []
        if all(isinstance(text, str) for text in texts):
            raise
        decode = current().service.decode_ids
        if decode is None:
            raise InvalidRequest(
                "holds token ids from another model's vocabulary; send texts "
                "(in LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False)",
                field="input",
            ) from None
        others = msgspec.json.decode(raw) | {"input": []}
        return _decoder.decode(msgspec.json.encode(others)), decode(texts)
    return body, _texts(body.input)
