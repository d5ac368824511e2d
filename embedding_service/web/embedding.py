"""The steps shared by every protocol's embedding views: ask the engine, encode, respond."""

import base64
import io
import string
from collections.abc import Callable
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt
from flask import Response
from msgspec import Meta

from embedding_service.engine import Embeddings, EmbedRequest, Vectors
from embedding_service.errors import FingerprintMismatch, ServiceError
from embedding_service.observability import metrics
from embedding_service.quantization import Precision, quantize
from embedding_service.web.body import dump, json_response
from embedding_service.web.limits import check_texts
from embedding_service.web.request import ServiceRequest, current

EncodingFormat = Annotated[
    Literal["float", "base64"],
    Meta(
        description="base64 is the vector's little-endian bytes: float32, unless `precision` says otherwise."
    ),
]
PrecisionField = Annotated[
    Precision,
    Meta(
        description=(
            "Number format of the vectors. binary and ubinary pack the signs of eight dimensions into a "
            "byte; int8 and uint8 need INT8_RANGES."
        )
    ),
]
Texts = Annotated[str | list[str], Meta(description="One or more texts.", examples=[["hello", "world"]])]

_NUMBERS = {"type": "array", "items": {"type": "number"}}
Vector = Annotated[Any, Meta(description="float32", extra_json_schema=_NUMBERS)]
MATRIX = {"type": "array", "items": _NUMBERS}
Matrix = Annotated[Any, Meta(description="float32", extra_json_schema=MATRIX)]
EncodedVector = Annotated[Any, Meta(extra_json_schema={"anyOf": [_NUMBERS, {"type": "string"}]})]
# Like EncodedVectors, but with null for a bad text, or a list of vectors for the tokens of a text.
EncodedTexts = Annotated[
    Any,
    Meta(
        extra_json_schema={
            "type": "array",
            "items": {
                "anyOf": [
                    _NUMBERS,
                    {"type": "string"},
                    {"type": "null"},
                    {"type": "array", "items": _NUMBERS},
                ]
            },
            "description": "One vector per text, in the order of the texts.",
        }
    ),
]
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


def ask(wanted: EmbedRequest, place: Place | None = None) -> Embeddings:
    """Check the limits and embed the texts.

    `place` maps the index of a text to the field and item in which the caller sent it, by default the same
    item of the protocol's field for texts.
    """
    service = current().service
    check_fingerprint()
    try:
        check_texts(wanted.texts, characters=wanted.on_error == "fail")
        if wanted.overflow in ("mean", "chunks") or wanted.on_error == "null":
            wanted = msgspec.structs.replace(
                wanted,
                max_chunks=service.settings.max_texts_per_request,
                max_characters=service.settings.max_text_characters,
            )
        result = service.call(wanted)
    except ServiceError as error:
        if place is not None and error.index is not None:
            error.field, error.index = place(error.index)
        raise
    timings = result.timings
    metrics.record_embedding(
        timings.tokenization_ms, timings.queue_ms, timings.inference_ms, len(result.truncated)
    )
    return result


def check_fingerprint() -> str:
    """The model's fingerprint. Raises FingerprintMismatch if the caller expects another one."""
    request = current()
    own = request.service.require_info().fingerprint
    expected: str | None = request.environ.get("HTTP_X_EXPECT_FINGERPRINT")
    if expected is not None and expected != own:
        raise FingerprintMismatch(
            f"the caller expects vectors of a model with the fingerprint {expected[:64]!r}, but this model's "
            f"is {own!r}: their vectors must not be compared"
        )
    return own


def in_precision(vectors: Vectors, precision: Precision | None, field: str = "precision") -> npt.NDArray[Any]:
    """The vectors in the requested number format. Raises InvalidRequest if it has no ranges."""
    if precision is None or precision == "float32":
        return vectors
    info = current().service.status().info
    return quantize(vectors, precision, info.int8_ranges if info else None, field)


def encoded(vectors: npt.NDArray[Any], encoding_format: str) -> Any:
    """The rows as arrays, or each as base64."""
    if encoding_format == "base64":
        return [base64.b64encode(vector).decode() for vector in vectors]
    return vectors


def model_name() -> str:
    """The name of the loaded model."""
    return current().service.model_name()


JSON, NPY = "application/json", "application/x-npy"


def wants_npy() -> bool:
    """Whether the caller prefers numpy's own format to JSON. Most callers do not name it at all."""
    if NPY not in current().environ.get("HTTP_ACCEPT", "").lower():
        return False
    return current().accept_mimetypes.best_match([JSON, NPY]) == NPY


def answer_npy(vectors: npt.NDArray[Any], result: Embeddings) -> Response:
    """The vectors as a .npy file of shape (texts, numbers), with the rest of the response in headers."""
    file = io.BytesIO()
    np.save(file, vectors, allow_pickle=False)
    # Headers are ASCII; a name in another script is percent-encoded, as in an address.
    about = [
        ("x-model", quote(model_name(), safe=string.punctuation + " ")),
        ("x-truncated-texts", str(len(result.truncated))),
    ]
    return Response(file.getvalue(), mimetype=NPY, headers=_headers(result) + about)


def answer_embeddings(body: Any, result: Embeddings) -> Response:
    """The body, with the headers of Text Embeddings Inference: tokens, and times in whole milliseconds."""
    return json_response(dump(body), headers=_headers(result))


def _headers(result: Embeddings) -> list[tuple[str, str]]:
    request, timings = current(), result.timings
    request.result, request.tokens = result, result.tokens
    headers = [
        *token_headers(request),
        ("x-tokenization-time", str(round(timings.tokenization_ms))),
        ("x-queue-time", str(round(timings.queue_ms))),
        ("x-inference-time", str(round(timings.inference_ms))),
    ]
    if result.cache_hits is not None:
        headers.append(("x-cache-hits", str(result.cache_hits)))
    return headers


def token_headers(request: ServiceRequest) -> list[tuple[str, str]]:
    """The model's fingerprint, the tokens that were read and the total time in whole milliseconds."""
    return [
        # Checked again, in case the model was replaced meanwhile.
        ("x-model-fingerprint", check_fingerprint()),
        ("x-compute-tokens", str(request.tokens)),
        ("x-total-time", str(round(request.seconds * 1e3))),
    ]
