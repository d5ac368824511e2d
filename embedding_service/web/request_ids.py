"""A request id for every request: the caller's if it is sane, else a new one; in the answer and the log."""

import re
import uuid

from flask import Flask, Response, request

from embedding_service import logs

SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def register(app: Flask) -> None:
    """Attach to the app's requests and answers."""
    app.before_request(_begin)
    app.after_request(_end)


def _begin() -> None:
    given = request.headers.get("X-Request-ID", "")
    logs.request_id.set(given if SANE.fullmatch(given) else uuid.uuid4().hex)


def _end(response: Response) -> Response:
    response.headers["X-Request-ID"] = logs.request_id.get() or ""
    return response
