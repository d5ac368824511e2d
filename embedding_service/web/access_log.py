"""Logs a line for each request (ACCESS_LOG), and a warning for each slow one (SLOW_REQUEST_SECONDS)."""

import logging

from flask import Flask, Response

from embedding_service.settings.config import Config
from embedding_service.web.context import current

log = logging.getLogger(__name__)


def register(app: Flask, settings: Config) -> None:
    """Attach to the app's responses if one of the settings is on."""
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
        fields["queue_ms"] = round(request.result.timings.queue_ms, 1)
        fields["inference_ms"] = round(request.result.timings.inference_ms, 1)
        fields["truncated"] = len(request.result.truncated)
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    log.log(level, "%s %s", what, text, extra={"fields": fields})
