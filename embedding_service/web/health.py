"""GET /health, /health/live, /health/ready and /info: the service's state, model and limits."""

from typing import Any, Literal, NotRequired

from flask import Blueprint, Response

from embedding_service import __version__
from embedding_service.engine import ModelInfo, State, Status
from embedding_service.errors import Unavailable
from embedding_service.web.context import current
from embedding_service.web.responses import answer
from embedding_service.web.route_spec import RouteSpec, shape

blueprint = Blueprint("health", __name__)


HealthAnswer = shape(
    "HealthAnswer",
    "The service's state, its model once loaded, and the reason if it cannot serve requests.",
    status=State,
    model=NotRequired[str],
    device=NotRequired[str],
    embedding_dimension=NotRequired[int],
    reason=NotRequired[str],
)
LiveAnswer = shape("LiveAnswer", "The process is alive.", status=Literal["alive"])
Pooling = shape("Pooling", "How token vectors are combined into one.", pooling=str)
ModelType = shape("ModelType", "What the model is for.", embedding=Pooling)
DeviceAnswer = shape("DeviceAnswer", "A model process: its device and state.", device=str, status=State)
# What /info says of the model in the same words as the engine.
SAME = ("model_name", "embedding_dimension", "device", "batch_size", "backend", "fingerprint", "prompts")
InfoAnswer = shape(
    "InfoAnswer",
    "The model and the request limits.",
    **{name: ModelInfo.__annotations__[name] for name in SAME},
    max_seq_length=int,
    model_id=str,
    served_model_name=str,
    model_sha=str | None,
    model_dtype=str,
    model_type=ModelType,
    max_input_length=int,
    max_client_batch_size=int,
    max_batch_tokens=int,
    max_concurrent_requests=int,
    auto_truncate=bool,
    version=str,
    default_prompt_name=str | None,
    devices=list[DeviceAnswer],  # type: ignore[valid-type]
)


@blueprint.get("/health")
@blueprint.get("/health/ready")
@RouteSpec({200: HealthAnswer, 503: HealthAnswer}, public=True)
def health() -> Response:
    """200 only if the service can serve requests."""
    return _report(current().service.status())


@blueprint.get("/health/live")
@RouteSpec({200: LiveAnswer, 503: HealthAnswer}, public=True)
def live() -> Response:
    """503 only if nothing but a restart helps."""
    if current().service.engine.must_restart():
        return _report(current().service.status())
    return _uncached(answer({"status": "alive"}))


@blueprint.get("/info")
@RouteSpec({200: InfoAnswer}, raises=(Unavailable,))
def info() -> Response:
    """The model and the limits, under our names and those of Text Embeddings Inference."""
    service = current().service
    model, settings, status = service.require_info(), service.settings, service.status()
    length = service.max_tokens(model)
    found = {name: getattr(model, name) for name in SAME} | {
        "max_seq_length": length,
        "model_id": model.model_name,
        "served_model_name": model.model_name,
        "model_sha": model.revision,
        "model_dtype": model.dtype,
        "model_type": {"embedding": {"pooling": model.pooling}},
        "max_input_length": length,
        "max_client_batch_size": settings.max_texts_per_request,
        # TEI's clients send batches of this size. It may be large, since we split large requests ourselves.
        "max_batch_tokens": max(model.max_batch_tokens, model.batch_size * length),
        "max_concurrent_requests": settings.max_concurrent_requests,
        "auto_truncate": True,
        "version": __version__,
        "default_prompt_name": model.default_prompt_name,
        "devices": [
            {"device": device, "status": state}
            for device, state in status.devices or [(model.device, status.state)]
        ],
    }
    return answer(found)


def _report(status: Status) -> Response:
    body: dict[str, Any] = {"status": status.state}
    if status.info is not None:
        body["model"] = status.info.model_name
        body["device"] = status.info.device
        body["embedding_dimension"] = status.info.embedding_dimension
    if status.state == "healthy":
        return _uncached(answer(body))
    body["reason"] = status.reason
    response = _uncached(answer(body, 503))
    response.headers["Retry-After"] = "1"
    return response


def _uncached(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response
