"""The steps shared by every protocol's embedding views: ask the engine, encode, respond."""

import base64
from collections.abc import Callable
from typing import Annotated, Any, Literal

from flask import Response
from msgspec import Meta

from embedding_service.engine import Embeddings, EmbedRequest, Vectors
from embedding_service.errors import ServiceError
from embedding_service.web.body import answer
from embedding_service.web.context import context
from embedding_service.web.limits import check_texts
from embedding_service.web.request import current

EncodingFormat = Annotated[
    Literal["float", "base64"],
    Meta(description="base64 is the vector's little-endian float32, in a quarter of the bytes."),
]
Dimensions = Annotated[
    int,
    Meta(
        ge=1, le=65_536, description="Truncate each vector to this many dimensions, then normalise it again."
    ),
]
PromptName = Annotated[str, Meta(description="Name of one of the model's prompts (GET /info lists them).")]
InputType = Annotated[
    Literal["query", "document"], Meta(description="Use the model's own prompt for queries or documents.")
]

_NUMBERS = {"type": "array", "items": {"type": "number"}}
Vector = Annotated[Any, Meta(description="float32", extra_json_schema=_NUMBERS)]
Matrix = Annotated[Any, Meta(description="float32", extra_json_schema={"type": "array", "items": _NUMBERS})]
EncodedVector = Annotated[Any, Meta(extra_json_schema={"anyOf": [_NUMBERS, {"type": "string"}]})]
EncodedVectors = Annotated[
    Any,
    Meta(
        extra_json_schema={
            "type": "array",
            "items": {"anyOf": [_NUMBERS, {"type": "string"}]},
            "description": "One vector per text, in the order of the texts.",
        }
    ),
]


def listed(texts: str | list[str]) -> list[str]:
    """One text or many, as a list."""
    return [texts] if isinstance(texts, str) else texts


Place = Callable[[int], tuple[str, int | None]]


def ask(request: EmbedRequest, place: Place | None = None) -> Embeddings:
    """The engine's embeddings of texts within the limits.

    `place` maps a text's index to the field and item that the caller sent it in; by default that is the
    same item of the protocol's own field for texts.
    """
    try:
        check_texts(request.texts)
        return context().embed(request)
    except ServiceError as error:
        if place is not None and error.index is not None:
            error.field, error.index = place(error.index)
        raise


def encoded(vectors: Vectors, encoding_format: str) -> Any:
    """The rows as arrays, or each as base64."""
    if encoding_format == "base64":
        return [base64.b64encode(vector).decode() for vector in vectors]
    return vectors


def model_name() -> str:
    """The name of the loaded model."""
    info = context().status().info
    return info.model_name if info else ""


def answer_embeddings(body: Any, result: Embeddings) -> Response:
    """The body, with the headers of Text Embeddings Inference: tokens, and times in whole milliseconds."""
    response = answer(body)
    timings = result.timings
    response.headers.extend(
        [
            ("x-compute-tokens", str(result.tokens)),
            ("x-total-time", str(round(current().seconds * 1e3))),
            ("x-tokenization-time", str(round(timings.tokenization_ms))),
            ("x-queue-time", str(round(timings.queue_ms))),
            ("x-inference-time", str(round(timings.inference_ms))),
        ]
    )
    if result.cache_hits is not None:
        response.headers["x-cache-hits"] = str(result.cache_hits)
    return response
