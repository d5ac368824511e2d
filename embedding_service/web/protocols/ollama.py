"""Ollama: POST /api/embed and /api/embeddings, and the routes that its clients call before these."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NotRequired

import msgspec
from flask import Response, request
from msgspec import Meta

from embedding_service.engine import ListTokensRequest, ModelInfo
from embedding_service.errors import InvalidRequest, NotFound, Unavailable
from embedding_service.web.body import BodyDecoder, parse
from embedding_service.web.context import current
from embedding_service.web.elsewhere import instead
from embedding_service.web.options import Options
from embedding_service.web.options import embed as embed_texts
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.responses import JSON, Matrix, Texts, Vector, answer, listed, vector_headers
from embedding_service.web.route_spec import RouteSpec, shape
from embedding_service.web.unknown_fields import check_others

JSON_LINES = "application/x-ndjson"
STARTED = datetime.now(UTC).isoformat()
FOREVER = "9999-12-31T23:59:59Z"

# The level of Ollama's API that is followed: some clients require one.
API_VERSION = "0.12.0"
QUANTIZATION_LEVELS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# Names and tags in Ollama's library, by the last part of a model's name on the hub.
LIBRARY_NAMES = {
    "all-minilm-l6-v2": ("all-minilm:latest", "all-minilm:l6-v2", "all-minilm:22m"),
    "all-minilm-l12-v2": ("all-minilm:l12-v2", "all-minilm:33m"),
    "bge-large-en-v1.5": ("bge-large:latest", "bge-large:335m"),
    "bge-m3": ("bge-m3:latest", "bge-m3:567m"),
    "embeddinggemma-300m": ("embeddinggemma:latest", "embeddinggemma:300m"),
    "mxbai-embed-large-v1": ("mxbai-embed-large:latest", "mxbai-embed-large:335m", "mxbai-embed-large:v1"),
    "nomic-embed-text-v1.5": ("nomic-embed-text:latest", "nomic-embed-text:v1.5"),
    "paraphrase-multilingual-minilm-l12-v2": ("paraphrase-multilingual:latest",),
    "qwen3-embedding-0.6b": ("qwen3-embedding:0.6b",),
    "snowflake-arctic-embed-l-v2.0": ("snowflake-arctic-embed2:latest", "snowflake-arctic-embed2:568m"),
}


OllamaErrorAnswer = shape(
    "OllamaErrorAnswer",
    "An error in Ollama's format. Without a key, its Go client shows only `status`.",
    error=str,
    status=NotRequired[str],
)


def render(failure: Failure) -> tuple[dict[str, Any], int]:
    """Ollama's error."""
    body = {"error": failure.message}
    if failure.status == 401:
        body["status"] = failure.message
    return body, failure.status


protocol = ApiProtocol(
    "ollama", "Ollama", render, OllamaErrorAnswer, paths=("/api",), names={"texts": "input"}
)


class OllamaEmbedBody(Options, frozen=True, kw_only=True):
    """Texts to embed. Without texts, Ollama loads the model; here it is always loaded."""

    model: str | None = None
    input: Texts | None = None
    dimensions: Annotated[int, Meta(ge=0, le=65_536)] | None = None
    keep_alive: Any = None
    options: dict[str, Any] | None = None


OllamaEmbedAnswer = shape(
    "OllamaEmbedAnswer",
    "The embeddings, in the order of the texts; durations are in nanoseconds.",
    model=str,
    embeddings=Matrix,
    total_duration=int,
    load_duration=int,
    prompt_eval_count=int,
)


class OllamaEmbeddingsBody(Options, frozen=True, kw_only=True):
    """One text to embed."""

    model: str | None = None
    prompt: Annotated[str, Meta(examples=["hello"])] | None = None
    keep_alive: Any = None
    options: dict[str, Any] | None = None


OllamaEmbeddingsAnswer = shape(
    "OllamaEmbeddingsAnswer", "One vector, as the model computes it.", embedding=Vector
)
OllamaDetails = shape(
    "OllamaDetails",
    "The kind of model.",
    parent_model=str,
    format=str,
    family=str,
    families=list[str],
    parameter_size=str,
    quantization_level=str,
)
OllamaModel = shape(
    "OllamaModel",
    "A model that can be used.",
    name=str,
    model=str,
    modified_at=str,
    size=int,
    digest=str,
    details=OllamaDetails,
)
OllamaTags = shape("OllamaTags", "All models, which is one.", models=[OllamaModel])
OllamaRunningModel = shape(
    "OllamaRunningModel",
    "A model that is loaded.",
    **OllamaModel.__annotations__,
    expires_at=str,
    size_vram=int,
    context_length=int,
)
OllamaRunning = shape("OllamaRunning", "All loaded models, which is one.", models=[OllamaRunningModel])


class OllamaNameBody(msgspec.Struct, frozen=True):
    """A model; older clients send `name`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None


class OllamaGenerateBody(OllamaNameBody, frozen=True):
    """A model to load or unload; texts are not generated."""

    prompt: str | None = None
    keep_alive: Any = None


OllamaGenerated = shape(
    "OllamaGenerated",
    "What Ollama answers when it has loaded or unloaded a model.",
    model=str,
    created_at=str,
    response=Literal[""],
    done=Literal[True],
    done_reason=Literal["load", "unload"],
)
OllamaShow = shape(
    "OllamaShow",
    "The details that Ollama's clients read before they use a model.",
    license=str,
    modelfile=str,
    parameters=str,
    template=str,
    details=OllamaDetails,
    model_info=dict[str, Any],
    capabilities=list[str],
    modified_at=str,
)
OllamaPull = shape("OllamaPull", "The progress of a download.", status=str)
OllamaVersion = shape("OllamaVersion", "The level of Ollama's API that is followed.", version=str)


_embed_decoder = BodyDecoder(OllamaEmbedBody)
_name_decoder = BodyDecoder(OllamaNameBody)
_generate_decoder = BodyDecoder(OllamaGenerateBody)
_embeddings_decoder = BodyDecoder(OllamaEmbeddingsBody, normalizes=False)


@protocol.post("/api/embed")
@RouteSpec({200: OllamaEmbedAnswer}, body=_embed_decoder, embeds=True)
def embed() -> Response:
    """Embed one or more texts, as vectors of length 1."""
    body = parse(_embed_decoder)
    texts = listed(body.input or [])
    _check_options(body.options, texts)
    found = {"model": current().service.model_name, "embeddings": [], "load_duration": 0}
    if texts:
        result = embed_texts(texts, msgspec.structs.replace(body, dimensions=body.dimensions or None))
        found["embeddings"] = result.vectors
    durations = {"total_duration": round(current().seconds * 1e9), "prompt_eval_count": current().tokens or 0}
    return answer(found | durations, headers=vector_headers() if texts else ())


@protocol.post("/api/embeddings")
@RouteSpec({200: OllamaEmbeddingsAnswer}, body=_embeddings_decoder, embeds=True)
def embeddings() -> Response:
    """Embed one text, in the older form: the vector is scaled to length 1 only if `normalize` is true."""
    body = parse(_embeddings_decoder)
    if not body.prompt:
        return answer({"embedding": []})
    _check_options(body.options, [body.prompt], normalizes=False)
    # The text: the options have no prompt here.
    options = msgspec.structs.replace(body, prompt=None)
    result = embed_texts([body.prompt], options, lambda _index: ("prompt", None), normalize=False)
    return answer({"embedding": result.vectors[0]}, headers=vector_headers())


@protocol.get("/api/tags")
@RouteSpec({200: OllamaTags}, raises=(Unavailable,))
def tags() -> Response:
    """List the model under all its names, its own first."""
    info = current().service.require_info()
    return answer({"models": [_model(info, name) for name in _names(info)]})


@protocol.get("/api/ps")
@RouteSpec({200: OllamaRunning}, raises=(Unavailable,))
def running() -> Response:
    """List the model, which is always loaded."""
    info = current().service.require_info()
    one = {
        **_model(info, _names(info)[0]),
        "expires_at": FOREVER,
        "size_vram": 0 if info.device == "cpu" else info.size_bytes,
        "context_length": current().service.max_tokens(info),
    }
    return answer({"models": [one]})


@protocol.post("/api/show")
@RouteSpec({200: OllamaShow}, body=_name_decoder)
def show() -> Response:
    """Describe the model, whatever name is sent."""
    parse(_name_decoder)
    info = current().service.require_info()
    kind = info.architecture
    found = {
        "license": "",
        "modelfile": f"FROM {info.model_name}\n",
        "parameters": "",
        "template": "",
        "details": _details(info),
        "model_info": {
            "general.architecture": kind,
            "general.basename": info.model_name,
            "general.parameter_count": info.parameters,
            f"{kind}.context_length": current().service.max_tokens(info),
            f"{kind}.embedding_length": info.embedding_dimension,
        },
        "capabilities": ["embedding"],
        "modified_at": STARTED,
    }
    return answer(found)


@protocol.post("/api/pull")
@RouteSpec({200: OllamaPull}, media=(JSON_LINES, JSON), body=_name_decoder, raises=(NotFound,))
def pull() -> Response:
    """Succeed at once for a name of the model; another one would not be listed afterwards."""
    body = parse(_name_decoder)
    names = _names(current().service.require_info())
    wanted = body.model or body.name or names[0]
    if _tagged(wanted).lower() not in map(str.lower, names):
        raise NotFound(
            f"{wanted[:100]!r} is not served here; the one model has these names, and SERVED_MODEL_NAME "
            f"adds more: {', '.join(names)}"
        )
    if body.stream is False:
        return answer({"status": "success"})
    steps = [{"status": "pulling manifest"}, {"status": "success"}]
    return Response(msgspec.json.Encoder().encode_lines(steps), mimetype=JSON_LINES)


@protocol.delete("/api/delete")
@RouteSpec({200: None}, body=_name_decoder)
def delete() -> Response:
    """Succeed without effect: the model stays."""
    parse(_name_decoder)
    return Response()


@protocol.post("/api/generate")
@RouteSpec({200: OllamaGenerated}, body=_generate_decoder, raises=(NotFound,))
def generate() -> Response:
    """Succeed without effect if the model is only to be loaded or unloaded; no texts are generated."""
    body = parse(_generate_decoder)
    if body.prompt:
        raise NotFound(instead(request.path))
    found = {
        "model": body.model or current().service.model_name,
        "created_at": datetime.now(UTC).isoformat(),
        "response": "",
        "done": True,
        "done_reason": "unload" if body.keep_alive in (0, "0", "0s") else "load",
    }
    return answer(found)


@protocol.get("/api/version")
@RouteSpec({200: OllamaVersion})
def version() -> Response:
    """The level of Ollama's API that is followed."""
    return answer({"version": API_VERSION})


def _check_options(options: dict[str, Any] | None, texts: list[str], *, normalizes: bool = True) -> None:
    """Raises InvalidRequest for options that would change the vectors: a window that would cut a text."""
    check_others((), options or {}, "options.", normalizes=normalizes)
    window, info = (options or {}).get("num_ctx"), current().service.status().info
    if info is None or not isinstance(window, int | float) or not texts:
        return
    length = current().service.max_tokens(info)
    # In Ollama, 0 means the default.
    if not 0 < window < length:
        return
    tokenized = current().call(ListTokensRequest(texts=texts, deadline=current().deadline)).texts
    wanted = min(length, max(len(each.ids) for each in tokenized))
    if wanted > window:
        raise InvalidRequest(
            f"must be at least {wanted} for these texts, or left out", field="options.num_ctx"
        )


def _names(info: ModelInfo) -> list[str]:
    """Its own name, those of SERVED_MODEL_NAME and Ollama's library, and that of Ollama's examples."""
    short = info.model_name.rstrip("/").rpartition("/")[2].lower()
    library = LIBRARY_NAMES.get(short, ())
    return list(
        dict.fromkeys(map(_tagged, [info.model_name, *current().service.names, *library, short, "any"]))
    )


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _details(info: ModelInfo) -> dict[str, Any]:
    units = [(unit, info.parameters / size) for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3))]
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": info.architecture,
        "families": [info.architecture],
        "parameter_size": next((f"{n:.3g}{unit}" for unit, n in units if n >= 1), str(info.parameters)),
        "quantization_level": QUANTIZATION_LEVELS.get(info.dtype, info.dtype),
    }


def _model(info: ModelInfo, name: str) -> dict[str, Any]:
    facts = {"modified_at": STARTED, "size": info.size_bytes, "digest": info.fingerprint}
    return {"name": name, "model": name, "details": _details(info), **facts}
