"""POST /embed: the service's own API."""

from typing import Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from flask import Response

from embedding_service.engine import Embeddings, EmbedRequest, TokenVectorsRequest
from embedding_service.errors import InvalidRequest
from embedding_service.quantization import Precision
from embedding_service.web.body import BodyDecoder, read, texts_and_inputs
from embedding_service.web.context import current, current_id
from embedding_service.web.options import Options, Prompt, embed_tokens, understand
from embedding_service.web.options import embed as embed_texts
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.protocols import tei
from embedding_service.web.responses import (
    JSON,
    NPY,
    EncodedTexts,
    EncodingFormat,
    Texts,
    answer,
    answer_npy,
    encoded,
    vector_headers,
    wants_npy,
)
from embedding_service.web.route_spec import RouteSpec


class ErrorAnswer(TypedDict):
    """An error: a sentence for people, and a word for programs."""

    error: str
    error_type: str
    request_id: str | None
    field: NotRequired[str]
    index: NotRequired[int]
    reason: NotRequired[str]


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


protocol = ApiProtocol("native", "Embedding service", render, ErrorAnswer)


class EmbedBody(Options, frozen=True, kw_only=True):
    """Texts to embed."""

    texts: Texts
    prompt: Prompt | None = None
    on_error: Literal["fail", "null"] | None = None
    output: Literal["sentence", "tokens"] | None = None
    encoding_format: EncodingFormat | None = None
    precision: Precision | None = None


class Usage(TypedDict):
    """What the model read."""

    tokens: int
    truncated: NotRequired[list[int]]
    chunks: NotRequired[int]


class PieceAnswer(TypedDict):
    """The piece of a text that a vector belongs to: its characters from `start` to before `end`."""

    text: int
    start: int
    end: int


class TextError(TypedDict):
    """Why a text has no vector."""

    index: int
    error_type: str
    reason: str


class EmbedAnswer(TypedDict):
    """The embeddings, in the order of the texts."""

    embeddings: EncodedTexts
    dimension: int
    model: str
    count: int
    processing_time_ms: float
    usage: Usage
    chunks: NotRequired[list[PieceAnswer]]
    errors: NotRequired[list[TextError]]


_decoder = BodyDecoder(EmbedBody, near=True)


@protocol.post("/embed")
@RouteSpec({200: EmbedAnswer}, media=(JSON, NPY), body=_decoder, embeds=True, variant=tei.embed)
def embed() -> Response:
    """Embed one or more texts. A body for Text Embeddings Inference gets bare vectors, as there."""
    request, raw = current(), read()
    body = _decoder.exact(raw)
    if body is None:
        own, inputs = texts_and_inputs(raw)
        if own == b"null" and inputs != b"null":
            request.protocol = tei.protocol
            return tei.embed_raw(raw)
        body = _decoder.tolerant(raw)
    texts = [body.texts] if isinstance(body.texts, str) else body.texts
    as_npy = "npy" in request.environ.get("HTTP_ACCEPT", "").lower() and wants_npy()
    if body.output == "tokens":
        return _tokens(body, understand(texts, body), as_npy=as_npy)
    if as_npy and body.on_error == "null":
        raise InvalidRequest("null needs a JSON response, for the errors", field="on_error")
    if as_npy and body.overflow == "chunks":
        raise InvalidRequest(
            "chunks needs a JSON response, for the positions of the pieces", field="overflow"
        )
    result = embed_texts(texts, body, on_error=body.on_error or "fail")
    count, dimension = result.vectors.shape
    vectors: Any = result.vectors
    if body.precision is not None or body.encoding_format == "base64":
        # Integers cannot represent NaN.
        numbers = vectors if body.precision in (None, "float32", "float16") else np.nan_to_num(vectors)
        vectors = encoded(numbers, body.precision, as_base64=body.encoding_format == "base64" and not as_npy)
    if as_npy:
        return answer_npy(vectors, len(result.truncated))
    found: dict[str, Any] = {
        "embeddings": vectors,
        "dimension": dimension,
        "model": request.service.model_name,
        "count": count,
        "processing_time_ms": round(request.seconds * 1e3, 2),
        "usage": {"tokens": result.tokens, "truncated": result.truncated},
    }
    if result.chunks is not None or body.on_error == "null":
        _add_parts(found, body, result)
    return answer(found, headers=vector_headers())


def _add_parts(found: dict[str, Any], body: EmbedBody, result: Embeddings) -> None:
    """Add the pieces that were embedded, and the texts that were not."""
    if result.chunks is not None:
        found["usage"]["chunks"] = sum(map(len, result.chunks))
    if body.overflow == "chunks":
        found["chunks"] = [
            {"text": index, "start": chunk.start, "end": chunk.stop}
            for index, chunks in enumerate(result.chunks or [])
            for chunk in chunks
        ]
    if body.on_error == "null":
        bad = {error.index for error in result.errors}
        if body.overflow != "chunks":
            found["embeddings"] = [None if i in bad else one for i, one in enumerate(found["embeddings"])]
        found["errors"] = [msgspec.structs.asdict(error) for error in result.errors]


def _tokens(body: EmbedBody, wanted: EmbedRequest, *, as_npy: bool) -> Response:
    for name in ("dimensions", "overflow", "precision", "encoding_format", "on_error", "priority"):
        value = getattr(body, name)
        if value not in (None, "truncate", "float", "float32", "fail", "normal"):
            raise InvalidRequest("cannot be used with output: tokens", field=name)
    if body.truncate in (False, "NONE", "START"):
        raise InvalidRequest("cannot be used with output: tokens", field="truncate")
    if as_npy:
        raise InvalidRequest("tokens needs a JSON response", field="output")
    fields = ("texts", "deadline", "prompt_name", "input_type", "prompt")
    vectors = embed_tokens(TokenVectorsRequest(**{name: getattr(wanted, name) for name in fields}))
    found: EmbedAnswer = {
        "embeddings": vectors,
        "dimension": vectors[0].shape[1],
        "model": current().service.model_name,
        "count": len(vectors),
        "processing_time_ms": round(current().seconds * 1e3, 2),
        "usage": {"tokens": current().tokens or 0},
    }
    return answer(found, headers=vector_headers())
