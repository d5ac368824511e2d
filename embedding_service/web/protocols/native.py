"""POST /embed: the service's own API."""

import base64
import time
from typing import Annotated, Any, Literal

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from embedding_service.engine import Embeddings, EmbedRequest
from embedding_service.web.body import answer, parse
from embedding_service.web.context import context
from embedding_service.web.limits import check_texts

blueprint = Blueprint("native", __name__)


class EmbedBody(msgspec.Struct, frozen=True):
    """The body of POST /embed."""

    texts: str | list[str]
    normalize: bool = True
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    truncate: bool = True
    encoding_format: Literal["float", "base64"] = "float"


_decoder = msgspec.json.Decoder(EmbedBody)


@blueprint.post("/embed")
def embed() -> Response:
    """Embed one text or many."""
    began = time.monotonic()
    body = parse(_decoder)
    texts = [body.texts] if isinstance(body.texts, str) else body.texts
    check_texts(texts)
    request = EmbedRequest(
        texts=texts,
        deadline=began + context().settings.request_timeout_seconds,
        normalize=body.normalize,
        prompt_name=body.prompt_name,
        input_type=body.input_type,
        dimensions=body.dimensions,
        truncate=body.truncate,
    )
    result = context().embed(request)
    return answer(_answer(result, body.encoding_format, began))


def _answer(result: Embeddings, encoding_format: str, began: float) -> dict[str, Any]:
    vectors: Any = result.vectors
    if encoding_format == "base64":
        vectors = [base64.b64encode(vector).decode() for vector in vectors]
    info = context().status().info
    return {
        "embeddings": vectors,
        "dimension": result.vectors.shape[1],
        "model": info.model_name if info else "",
        "count": len(vectors),
        "processing_time_ms": round((time.monotonic() - began) * 1e3, 2),
        "usage": {"tokens": result.tokens, "truncated": result.truncated},
    }
