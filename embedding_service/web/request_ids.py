"""Puts the request id into responses, and the request id and the trace id into log lines."""

from flask import Flask, Response

from embedding_service.observability import logs
from embedding_service.web.request import current, current_id, current_trace_id


def register(app: Flask) -> None:
    """Attach to the app's responses and to this process's log."""
    logs.request_id = current_id
    logs.trace_id = current_trace_id
    app.after_request(_end)


def _end(response: Response) -> Response:
    request = current()
    response.headers.add("X-Request-ID", request.id)
    if request.callers_trace_id is not None:
        response.headers.setdefault("traceparent", request.environ["HTTP_TRACEPARENT"])
    return response
