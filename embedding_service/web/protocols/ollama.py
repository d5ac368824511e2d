"""Ollama: POST /api/embed and /api/embeddings, and the routes that its clients call before these."""

from datetime import UTC, datetime
from typing import Annotated, Any, TypedDict

import msgspec
from flask import Response
from msgspec import Meta

from embedding_service import __version__
from embedding_service.engine import EmbedRequest, ModelInfo
from embedding_service.errors import InvalidRequest, Unavailable
from embedding_service.web.body import BodyDecoder, answer, parse
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
from embedding_service.web.fields import check_others
from embedding_service.web.limits import max_tokens
from embedding_service.web.operation import operation
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.request import current

STARTED = datetime.now(UTC).isoformat()
FOREVER = "9999-12-31T23:59:59Z"

# Names of hub models in Ollama's library.
LIBRARY_NAMES = {
    "all-minilm-l6-v2": "all-minilm",
    "bge-large-en-v1.5": "bge-large",
    "bge-m3": "bge-m3",
    "embeddinggemma-300m": "embeddinggemma",
    "mxbai-embed-large-v1": "mxbai-embed-large",
    "nomic-embed-text-v1.5": "nomic-embed-text",
    "paraphrase-multilingual-minilm-l12-v2": "paraphrase-multilingual",
    "snowflake-arctic-embed-l-v2.0": "snowflake-arctic-embed2",
}


class OllamaErrorAnswer(TypedDict):
    """An error in Ollama's format."""

    error: str


def render(failure: Failure) -> tuple[OllamaErrorAnswer, int]:
    """Ollama's error."""
    return {"error": failure.message}, failure.status


protocol = ApiProtocol(
    "ollama", "Ollama", render, OllamaErrorAnswer, paths=("/api/",), names={"texts": "input"}
)

ModelName = Annotated[str, Meta(description="Any name; there is only one model, and the response names it.")]


KeepAlive = Annotated[Any, Meta(description="Not used: the model is always loaded.")]
Options = Annotated[
    dict[str, Any] | None,
    Meta(
        description="Options, most of them for generation; a num_ctx below the model's maximum is rejected."
    ),
]


class OllamaEmbedBody(msgspec.Struct, frozen=True):
    """Texts to embed. Without texts, Ollama loads the model; here it is always loaded."""

    model: ModelName | None = None
    input: Annotated[str | list[str], Meta(examples=[["hello", "world"]])] | None = None
    truncate: Annotated[bool, Meta(description="Truncate over-long texts; false rejects them.")] | None = None
    dimensions: Dimensions | None = None
    keep_alive: KeepAlive = None
    options: Options = None


class OllamaEmbedAnswer(TypedDict):
    """The embeddings, in the order of the texts; durations are in nanoseconds."""

    model: str
    embeddings: Matrix
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsBody(msgspec.Struct, frozen=True):
    """One text to embed."""

    model: ModelName | None = None
    prompt: str | None = None
    normalize: Annotated[bool, Meta(description="Scale the vector to length 1.")] | None = False
    keep_alive: KeepAlive = None
    options: Options = None


class OllamaEmbeddingsAnswer(TypedDict):
    """One vector, as the model computes it."""

    embedding: Vector


class OllamaDetails(TypedDict):
    """The kind of model."""

    format: str
    family: str
    quantization_level: str


class OllamaModel(TypedDict):
    """A model that can be used."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaTags(TypedDict):
    """All models, which is one."""

    models: list[OllamaModel]


class OllamaRunningModel(OllamaModel):
    """A model that is loaded."""

    expires_at: str
    size_vram: int


class OllamaRunning(TypedDict):
    """All loaded models, which is one."""

    models: list[OllamaRunningModel]


class OllamaNameBody(msgspec.Struct, frozen=True):
    """A model; older clients send `name`."""

    model: ModelName | None = None
    name: ModelName | None = None
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None


class OllamaShow(TypedDict):
    """The details that Ollama's clients read before they use a model."""

    modified_at: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaPull(TypedDict):
    """The result of a download."""

    status: str


class OllamaVersion(TypedDict):
    """This service's version."""

    version: str


_embed_decoder = BodyDecoder(OllamaEmbedBody)
_name_decoder = BodyDecoder(OllamaNameBody)
_embeddings_decoder = BodyDecoder(OllamaEmbeddingsBody, normalizes=False)


@protocol.post("/api/embed")
@operation({200: OllamaEmbedAnswer}, body=_embed_decoder, embeds=True)
def embed() -> Response:
    """Embed one or more texts, as vectors of length 1."""
    body = parse(_embed_decoder)
    _check_options(body.options)
    if not body.input:
        return answer(_answer([], 0))
    result = ask(
        EmbedRequest(
            texts=listed(body.input),
            deadline=current().deadline,
            dimensions=body.dimensions,
            overflow="error" if body.truncate is False else "truncate",
        )
    )
    return answer_embeddings(_answer(result.vectors, result.tokens), result)


@protocol.post("/api/embeddings")
@operation({200: OllamaEmbeddingsAnswer}, body=_embeddings_decoder, embeds=True)
def embeddings() -> Response:
    """Embed one text, in the older form: the vector is scaled to length 1 only if `normalize` is true."""
    body = parse(_embeddings_decoder)
    _check_options(body.options, normalizes=False)
    if not body.prompt:
        empty: OllamaEmbeddingsAnswer = {"embedding": []}
        return answer(empty)
    result = ask(
        EmbedRequest(texts=[body.prompt], deadline=current().deadline, normalize=body.normalize is True),
        lambda _index: ("prompt", None),
    )
    found: OllamaEmbeddingsAnswer = {"embedding": result.vectors[0]}
    return answer_embeddings(found, result)


@protocol.get("/api/tags")
@operation({200: OllamaTags}, raises=(Unavailable,))
def tags() -> Response:
    """List the model under all its names, its own first."""
    info = context().require_info()
    found: OllamaTags = {"models": [_model(info, name) for name in _names(info)]}
    return answer(found)


@protocol.get("/api/ps")
@operation({200: OllamaRunning}, raises=(Unavailable,))
def running() -> Response:
    """List the model, which is always loaded."""
    info = context().require_info()
    one: OllamaRunningModel = {**_model(info, info.model_name), "expires_at": FOREVER, "size_vram": 0}
    found: OllamaRunning = {"models": [one]}
    return answer(found)


@protocol.post("/api/show")
@operation({200: OllamaShow}, body=_name_decoder)
def show() -> Response:
    """Describe the model, whatever name is sent."""
    parse(_name_decoder)
    info = context().require_info()
    found: OllamaShow = {
        "modified_at": STARTED,
        "details": _details(info),
        "model_info": {
            "general.architecture": "bert",
            "general.basename": info.model_name,
            "bert.context_length": max_tokens(info),
            "bert.embedding_length": info.embedding_dimension,
        },
        "capabilities": ["embedding"],
    }
    return answer(found)


@protocol.post("/api/pull")
@operation({200: OllamaPull}, body=_name_decoder)
def pull() -> Response:
    """Succeed at once: the model is loaded, and any name means it."""
    parse(_name_decoder)
    context().require_info()
    found: OllamaPull = {"status": "success"}
    return answer(found)


@protocol.get("/api/version")
@operation({200: OllamaVersion})
def version() -> Response:
    """The version of this service."""
    found: OllamaVersion = {"version": __version__}
    return answer(found)


def _check_options(options: dict[str, Any] | None, *, normalizes: bool = True) -> None:
    """Raises InvalidRequest for options that would change the vectors: a window shorter than the model's."""
    check_others((), options or {}, "options.", normalizes=normalizes)
    window, info = (options or {}).get("num_ctx"), context().status().info
    if info is None or not isinstance(window, int | float):
        return
    length = max_tokens(info)
    # In Ollama, 0 means the default.
    if 0 < window < length:
        raise InvalidRequest(
            f"must be at least {length}, the model's maximum, or left out",
            field="options.num_ctx",
        )


def _names(info: ModelInfo) -> list[str]:
    """The model's own name, its names in Ollama's library, and the name in Ollama's examples."""
    short = info.model_name.rstrip("/").rpartition("/")[2].lower()
    known = [f"{LIBRARY_NAMES[short]}:latest"] if short in LIBRARY_NAMES else []
    served = context().names
    return list(dict.fromkeys([info.model_name, *served, *known, f"{short}:latest", "any:latest"]))


def _details(info: ModelInfo) -> OllamaDetails:
    return {
        "format": "safetensors",
        "family": "sentence-transformers",
        "quantization_level": info.dtype,
    }


def _model(info: ModelInfo, name: str) -> OllamaModel:
    return {
        "name": name,
        "model": name,
        "modified_at": STARTED,
        "size": 0,
        "digest": info.fingerprint,
        "details": _details(info),
    }


def _answer(vectors: Any, tokens: int) -> OllamaEmbedAnswer:
    return {
        "model": model_name(),
        "embeddings": vectors,
        "total_duration": round(current().seconds * 1e9),
        "load_duration": 0,
        "prompt_eval_count": tokens,
    }
