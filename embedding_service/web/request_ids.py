"""The id of a request in its answer and on the lines that are logged while it is under way."""

from flask import Flask, Response

from embedding_service import logs
from embedding_service.web.request import current, current_id


def register(app: Flask) -> None:
    """Attach to the app's answers, and to this process's log."""
    logs.request_id = current_id
    app.after_request(_end)


def _end(response: Response) -> Response:
    response.headers["X-Request-ID"] = current().id
    return response
