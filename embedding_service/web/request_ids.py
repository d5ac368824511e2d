"""Puts a request's id into its response and on every line logged during the request."""

from flask import Flask, Response

from embedding_service import logs
from embedding_service.web.request import current, current_id


def register(app: Flask) -> None:
    """Attach to the app's responses and to this process's log."""
    logs.request_id = current_id
    app.after_request(_end)


def _end(response: Response) -> Response:
    response.headers["X-Request-ID"] = current().id
    return response
