"""Puts a request's id into its response, and the id and the caller's trace on every line logged meanwhile."""

from flask import Flask, Response

from embedding_service import logs
from embedding_service.web.request import current, current_id, current_trace_id


def register(app: Flask) -> None:
    """Attach to the app's responses and to this process's log."""
    logs.request_id = current_id
    logs.trace_id = current_trace_id
    app.after_request(_end)


def _end(response: Response) -> Response:
    response.headers["X-Request-ID"] = current().id
    return response
