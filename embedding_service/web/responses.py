"""Responses: JSON and .npy, vectors in number formats and encodings, and headers that count and measure."""

import base64
import io
import string
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import orjson
from flask import Response
from msgspec import Meta
from werkzeug.datastructures import Headers

from embedding_service.engine import Vectors
from embedding_service.quantization import Precision, quantize
from embedding_service.web.context import current

JSON, NPY = "application/json", "application/x-npy"

EncodingFormat = Literal["float", "base64"]
Texts = Annotated[str | list[str], Meta(description="One or more texts.", examples=[["hello", "world"]])]

_NUMBERS = {"type": "array", "items": {"type": "number"}}
Vector = Annotated[Any, Meta(description="float32", extra_json_schema=_NUMBERS)]
MATRIX = {"type": "array", "items": _NUMBERS}
Matrix = Annotated[Any, Meta(description="float32", extra_json_schema=MATRIX)]
Matrices = Annotated[Any, Meta(description="float32", extra_json_schema={"type": "array", "items": MATRIX})]
EncodedVector = Annotated[Any, Meta(extra_json_schema={"anyOf": [_NUMBERS, {"type": "string"}]})]
_EACH = [_NUMBERS, {"type": "string"}, {"type": "null"}, {"type": "array", "items": _NUMBERS}]
# With null for a bad text, or a list of vectors for the tokens of a text.
EncodedTexts = Annotated[Any, Meta(extra_json_schema={"type": "array", "items": {"anyOf": _EACH}})]


def listed(texts: str | list[str]) -> list[str]:
    """One text or many, as a list."""
    return [texts] if isinstance(texts, str) else texts


class CheckedHeaders(list[tuple[str, str]]):
    """Headers of our own making, among them the length of the body; the worker need not check them."""

    are_checked = True


class WholeResponse(Response):
    """A response whose body and headers are complete, and are sent as they are.

    Werkzeug would check and derive them again, which takes longer than the view.
    """

    def __call__(self, environ: Any, start_response: Any) -> Any:
        start_response(self.status, CheckedHeaders(self.headers))
        return () if environ["REQUEST_METHOD"] == "HEAD" else self.response


def answer(body: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()) -> Response:
    """A JSON response. The values of `headers` must be ours, since nothing checks them."""
    # Numpy arrays are serialised without conversion to lists.
    data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    whole = Headers()
    whole._list = [("Content-Type", JSON), ("Content-Length", str(len(data))), *headers]
    return WholeResponse([data], status, whole)


def vector_headers() -> list[tuple[str, str]]:
    """The model's fingerprint, and the headers of Text Embeddings Inference: tokens, and milliseconds."""
    request = current()
    headers = [
        # Checked after the engine's answer, in case the model was replaced meanwhile.
        ("x-model-fingerprint", request.fingerprint()),
        ("x-compute-tokens", str(request.tokens)),
        ("x-total-time", str(round(request.seconds * 1e3))),
    ]
    if request.result is not None:
        timings = request.result.timings
        headers += [
            ("x-tokenization-time", str(round(timings.tokenization_ms))),
            ("x-queue-time", str(round(timings.queue_ms))),
            ("x-inference-time", str(round(timings.inference_ms))),
        ]
        if request.result.cache_hits is not None:
            headers.append(("x-cache-hits", str(request.result.cache_hits)))
    return headers


def wants_npy() -> bool:
    """Whether the caller prefers numpy's own format to JSON. Most callers do not name it at all."""
    return current().accept_mimetypes.best_match([JSON, NPY]) == NPY


def answer_npy(vectors: npt.NDArray[Any], truncated: int) -> Response:
    """The vectors as a .npy file of shape (texts, numbers), with the rest of the response in headers."""
    file = io.BytesIO()
    np.save(file, vectors, allow_pickle=False)
    # Headers are ASCII; a name in another script is percent-encoded, as in an address.
    about = [
        ("x-model", quote(current().service.model_name, safe=string.punctuation + " ")),
        ("x-truncated-texts", str(truncated)),
    ]
    return Response(file.getvalue(), mimetype=NPY, headers=vector_headers() + about)


# The number formats but float32, which several names mean.
OTHER_PRECISIONS: dict[str | None, Precision] = {
    name: name for name in get_args(Precision) if name != "float32"
}


def encoded(
    vectors: Vectors, number_format: str | None, *, as_base64: bool = False, field: str = "precision"
) -> Any:
    """The vectors in a number format, as an array or each as base64.

    Raises InvalidRequest, about `field`, if the format has no ranges.
    """
    numbers: npt.NDArray[Any] = vectors
    if precision := OTHER_PRECISIONS.get(number_format):
        info = current().service.status().info
        numbers = quantize(vectors, precision, info.int8_ranges if info else None, field)
    return [base64.b64encode(vector).decode() for vector in numbers] if as_base64 else numbers
