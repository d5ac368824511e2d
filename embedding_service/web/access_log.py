"""Logs a line for each request (ACCESS_LOG), and a warning for each slow one (SLOW_REQUEST_SECONDS)."""

import logging

from flask import Flask, Response

from embedding_service.engine import Embeddings
from embedding_service.web.context import KEY
from embedding_service.web.request import current

log = logging.getLogger(__name__)


def register(app: Flask) -> None:
    """Attach to the app's responses if one of the settings is on."""
    settings = app.extensions[KEY].settings
    slow = settings.slow_request_seconds
    if not settings.access_log and not slow:
        return

    def end(response: Response) -> Response:
        if slow and current().seconds > slow:
            _write(logging.WARNING, "slow request", response)
        elif settings.access_log:
            _write(logging.INFO, "request", response)
        return response

    app.after_request(end)


def _write(level: int, what: str, response: Response) -> None:
    request = current()
    fields: dict[str, str | int | float] = {
        "method": request.method,
        "route": request.url_rule.rule if request.url_rule is not None else request.path[:200],
        "status": response.status_code,
        "ms": round(request.seconds * 1e3, 1),
    }
    counts = {"texts": request.texts, "tokens": request.tokens}
    fields |= {name: count for name, count in counts.items() if count is not None}
    if request.result is not None:
        fields |= _of(request.result)
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    log.log(level, "%s %s", what, text, extra={"fields": fields})


def _of(result: Embeddings) -> dict[str, int | float]:
    return {
        "queue_ms": round(result.timings.queue_ms, 1),
        "inference_ms": round(result.timings.inference_ms, 1),
        "truncated": len(result.truncated),
    }
