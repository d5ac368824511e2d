"""GET /health, /health/live, /health/ready and /info: what the service says of itself."""

from typing import Any

from flask import Blueprint, Response

from embedding_service import __version__
from embedding_service.engine import Status
from embedding_service.web.body import answer
from embedding_service.web.context import context

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
@blueprint.get("/health/ready")
def health() -> Response:
    """200 only when a request would be served."""
    return _report(context().status())


@blueprint.get("/health/live")
def live() -> Response:
    """503 only when nothing but a new process can help."""
    if context().engine.must_restart():
        return _report(context().status())
    return _uncached(answer({"status": "alive"}))


@blueprint.get("/info")
def info() -> Response:
    """The model and the limits: the user's names, beside them those of Text Embeddings Inference."""
    status, settings = context().require_info(), context().settings
    model = status.info
    assert model is not None
    return answer(
        {
            "model_name": model.model_name,
            "embedding_dimension": model.embedding_dimension,
            "max_seq_length": model.max_seq_length,
            "device": model.device,
            "batch_size": model.batch_size,
            "model_id": model.model_name,
            "model_sha": model.revision,
            "model_dtype": model.dtype,
            "model_type": {"embedding": {"pooling": model.pooling}},
            "max_input_length": model.max_seq_length,
            "max_client_batch_size": settings.max_texts_per_request,
            "max_batch_tokens": model.max_batch_tokens,
            "max_concurrent_requests": settings.web_threads,
            "auto_truncate": True,
            "version": __version__,
            "backend": model.backend,
            "fingerprint": model.fingerprint,
            "prompts": model.prompts,
        }
    )


def _report(status: Status) -> Response:
    body: dict[str, Any] = {"status": status.state}
    if status.info is not None:
        body |= {
            "model": status.info.model_name,
            "device": status.info.device,
            "embedding_dimension": status.info.embedding_dimension,
        }
    if status.state == "healthy":
        return _uncached(answer(body))
    response = _uncached(answer(body | {"reason": status.reason}, 503))
    response.headers["Retry-After"] = "1"
    return response


def _uncached(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response
