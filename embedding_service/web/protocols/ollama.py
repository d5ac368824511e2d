"""Ollama: POST /api/embed and /api/embeddings, GET /api/tags and /api/version."""

from datetime import UTC, datetime
from typing import Annotated, Any, TypedDict

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service import __version__
from embedding_service.engine import EmbedRequest
from embedding_service.errors import Unavailable
from embedding_service.web.body import answer, parse
from embedding_service.web.context import context
from embedding_service.web.embedding import (
    Dimensions,
    Matrix,
    Vector,
    answer_embeddings,
    ask,
    listed,
    model_name,
)
from embedding_service.web.operation import operation
from embedding_service.web.protocol import Failure, Protocol
from embedding_service.web.request import current

STARTED = datetime.now(UTC).isoformat()


class OllamaErrorAnswer(TypedDict):
    """An error in Ollama's form."""

    error: str


def render(failure: Failure) -> tuple[OllamaErrorAnswer, int]:
    """Ollama's error."""
    return {"error": failure.message}, failure.status


protocol = Protocol("ollama", "Ollama", render, OllamaErrorAnswer, paths=("/api/",), names={"texts": "input"})

ModelName = Annotated[str, Meta(description="Any name: there is one model, and the answer names it.")]


class OllamaEmbedBody(msgspec.Struct, frozen=True):
    """Texts to embed; none loads the model, which here is always loaded."""

    model: ModelName = ""
    input: Annotated[str | list[str], Meta(examples=[["hello", "world"]])] | None = None
    truncate: Annotated[bool, Meta(description="Cut over-long texts; false refuses them.")] | None = None
    dimensions: Dimensions | None = None


class OllamaEmbedAnswer(TypedDict):
    """The embeddings, in the order of the texts; durations are in nanoseconds."""

    model: str
    embeddings: Matrix
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsBody(msgspec.Struct, frozen=True):
    """One text to embed."""

    model: ModelName = ""
    prompt: str = ""


class OllamaEmbeddingsAnswer(TypedDict):
    """One vector, as the model gives it."""

    embedding: Vector


class OllamaDetails(TypedDict):
    """What kind of model it is."""

    format: str
    family: str
    quantization_level: str


class OllamaModel(TypedDict):
    """A model that can be asked for."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaTags(TypedDict):
    """All models: the one."""

    models: list[OllamaModel]


class OllamaVersion(TypedDict):
    """This service's version."""

    version: str


_embed_decoder = msgspec.json.Decoder(OllamaEmbedBody)
_embeddings_decoder = msgspec.json.Decoder(OllamaEmbeddingsBody)


@protocol.post("/api/embed")
@operation({200: OllamaEmbedAnswer}, body=_embed_decoder, embeds=True)
def embed() -> Response:
    """Embed one text or many, as vectors of length 1."""
    body = parse(_embed_decoder)
    if not body.input:
        return answer(_answer([], 0))
    result = ask(
        EmbedRequest(
            texts=listed(body.input),
            deadline=current().deadline,
            dimensions=body.dimensions,
            truncate=body.truncate is not False,
        )
    )
    return answer_embeddings(_answer(result.vectors, result.tokens), result)


@protocol.post("/api/embeddings")
@operation({200: OllamaEmbeddingsAnswer}, body=_embeddings_decoder, embeds=True)
def embeddings() -> Response:
    """Embed one text; the older form, whose vector is as the model gives it, not normalised."""
    body = parse(_embeddings_decoder)
    if not body.prompt:
        empty: OllamaEmbeddingsAnswer = {"embedding": []}
        return answer(empty)
    result = ask(
        EmbedRequest(texts=[body.prompt], deadline=current().deadline, normalize=False),
        lambda _index: ("prompt", None),
    )
    found: OllamaEmbeddingsAnswer = {"embedding": result.vectors[0]}
    return answer_embeddings(found, result)


@protocol.get("/api/tags")
@operation({200: OllamaTags}, raises=(Unavailable,))
def tags() -> Response:
    """List the one model."""
    info = context().require_info()
    found: OllamaTags = {
        "models": [
            {
                "name": info.model_name,
                "model": info.model_name,
                "modified_at": STARTED,
                "size": 0,
                "digest": info.fingerprint,
                "details": {
                    "format": "safetensors",
                    "family": "sentence-transformers",
                    "quantization_level": info.dtype,
                },
            }
        ]
    }
    return answer(found)


@protocol.get("/api/version")
@operation({200: OllamaVersion})
def version() -> Response:
    """The version of this service."""
    found: OllamaVersion = {"version": __version__}
    return answer(found)


def _answer(vectors: Any, tokens: int) -> OllamaEmbedAnswer:
    return {
        "model": model_name(),
        "embeddings": vectors,
        "total_duration": round(current().seconds * 1e9),
        "load_duration": 0,
        "prompt_eval_count": tokens,
    }
