"""Weaviate's text2vec-transformers: POST /vectors, GET /meta, /.well-known/ready and /.well-known/live."""

from typing import Any, Literal

import msgspec
from flask import Response

from embedding_service.errors import InvalidRequest, Unavailable
from embedding_service.web.body import BodyDecoder, parse
from embedding_service.web.context import current
from embedding_service.web.options import Options, embed
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.responses import Matrix, Vector, answer, vector_headers
from embedding_service.web.route_spec import RouteSpec, shape

WeaviateErrorAnswer = shape("WeaviateErrorAnswer", "An error in the format that Weaviate reads.", error=str)


def render(failure: Failure) -> tuple[dict[str, Any], int]:
    """The error that Weaviate passes on to its caller."""
    return {"error": failure.message}, failure.status


protocol = ApiProtocol(
    "weaviate",
    "Weaviate",
    render,
    WeaviateErrorAnswer,
    paths=("/vectors", "/.well-known"),
    names={"dimensions": "config.dimensions"},
)


class WeaviateConfig(Options, frozen=True, kw_only=True):
    """How to embed."""

    task_type: Literal["query", "passage", ""] | None = None
    pooling_strategy: str | None = None


class WeaviateBody(msgspec.Struct, frozen=True):
    """One text, or several in `texts`."""

    text: str | None = None
    texts: list[str] | None = None
    config: WeaviateConfig | None = None


WeaviateAnswer = shape(
    "WeaviateAnswer", "One vector, with its text.", text=str, vector=Vector, dim=int, dims=int
)
WeaviateBatchAnswer = shape(
    "WeaviateBatchAnswer", "The vectors, in the order of the texts.", vectors=Matrix, dims=int
)
WeaviateMeta = shape(
    "WeaviateMeta",
    "The model, as Weaviate lists it among its modules.",
    model=str,
    model_type=str,
    embedding_dimension=int,
    max_seq_length=int,
)


_decoder = BodyDecoder(WeaviateBody)


@protocol.post("/vectors")
@RouteSpec({200: (WeaviateAnswer, WeaviateBatchAnswer)}, body=_decoder, embeds=True)
def vectors() -> Response:
    """Embed one or more texts, as vectors of length 1."""
    body = parse(_decoder)
    config = body.config or WeaviateConfig()
    _check_pooling(config.pooling_strategy)
    if isinstance(body.texts, list):
        texts, place = body.texts, None
    elif isinstance(body.text, str):
        texts, place = [body.text], _place_of_one
    else:
        raise InvalidRequest("the request has neither text nor texts")
    result = embed(texts, config, place, parent="config.", advice='"config": {"truncate": true}')
    dims = result.vectors.shape[1]
    found = {"vectors": result.vectors, "dims": dims}
    if body.texts is None:
        found = {"text": texts[0], "vector": result.vectors[0], "dim": dims, "dims": dims}
    return answer(found, headers=vector_headers())


def _check_pooling(strategy: str | None) -> None:
    """Raises InvalidRequest if the user chose another pooling than the model's."""
    info = current().service.status().info
    # Weaviate sends masked_mean by default.
    if info is not None and strategy not in (None, "", "masked_mean", info.pooling):
        raise InvalidRequest(
            f"is {strategy[:50]!r}; the model's own pooling is {info.pooling!r}",
            field="config.pooling_strategy",
        )


def _place_of_one(_index: int) -> tuple[str, None]:
    return "text", None


@protocol.get("/meta")
@RouteSpec({200: WeaviateMeta}, raises=(Unavailable,))
def meta() -> Response:
    """Describe the model."""
    info = current().service.require_info()
    found = {
        "model": info.model_name,
        "model_type": info.pooling,
        "embedding_dimension": info.embedding_dimension,
        "max_seq_length": current().service.max_tokens(info),
    }
    return answer(found)


@protocol.get("/.well-known/ready")
@RouteSpec({204: None}, raises=(Unavailable,), public=True)
def ready() -> Response:
    """204 only if the service can serve requests."""
    status = current().service.status()
    if status.state != "healthy":
        raise Unavailable(status.reason, retry_after_seconds=1)
    return Response(status=204)


@protocol.get("/.well-known/live")
@RouteSpec({204: None}, raises=(Unavailable,), public=True)
def live() -> Response:
    """503 only if nothing but a restart helps."""
    if current().service.engine.must_restart():
        raise Unavailable(current().service.status().reason, retry_after_seconds=1)
    return Response(status=204)
