"""Turns every error into JSON: ours by class, Werkzeug's by status code, anything else as a 500."""

import logging
import math

from flask import Flask, Response, current_app
from werkzeug.exceptions import HTTPException

from embedding_service.errors import Overloaded, ServiceError
from embedding_service.web.context import current
from embedding_service.web.elsewhere import instead
from embedding_service.web.protocol import ApiProtocol, Failure
from embedding_service.web.protocols import native
from embedding_service.web.responses import answer

log = logging.getLogger(__name__)

# Maximum number of logged characters of a message, which may quote what the caller sent.
LOGGED_CHARACTERS = 200

HTTP_ERROR_TYPES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def register(app: Flask) -> None:
    """Attach the handlers."""
    app.register_error_handler(ServiceError, on_service_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_bug)


def on_service_error(error: ServiceError) -> Response:
    """The error in the format of the caller's protocol, with Retry-After if the error has one."""
    level = logging.WARNING if error.status >= 500 else logging.INFO
    # Rejections are not logged by default, so that an overloaded service does not fill its disk.
    level = logging.DEBUG if isinstance(error, Overloaded) else level
    failure = current_protocol().failure(error, current().asked)
    log.log(level, "%d %s: %s", error.status, error.error_type, failure.message[:LOGGED_CHARACTERS])
    response = render(failure)
    if error.retry_after_seconds is not None:
        # In whole seconds, and for clients that understand it, in milliseconds.
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_seconds))
        response.headers["retry-after-ms"] = str(math.ceil(error.retry_after_seconds * 1000))
    return response


def on_http_error(error: HTTPException) -> Response:
    """Werkzeug's own errors and redirects, with their headers (such as Allow with a 405)."""
    status = error.code or 500
    error_type = HTTP_ERROR_TYPES.get(status, "validation" if status < 500 else "internal")
    reason = instead(current().path) if status == 404 else error.description or error.name
    response = render(Failure(status, error_type, reason))
    for name, value in error.get_headers():
        if name.lower() != "content-type":
            response.headers[name] = value
    return response


def on_bug(error: Exception) -> Response:
    """A bug in the service: the details are logged with the request id, and not sent to the caller."""
    log.error("A request failed: %s", type(error).__name__, exc_info=error)
    return render(Failure(500, "internal", "the service failed on this request; its log says why"))


def render(failure: Failure) -> Response:
    """The failure in the form that clients of the request's protocol expect."""
    return answer(*current_protocol().render(failure))


def current_protocol() -> ApiProtocol:
    """The protocol of this request: set explicitly, or found by route or longest path, or the native one."""
    request, blueprints = current(), current_app.blueprints
    chosen = request.protocol or blueprints.get(request.blueprint or "")
    if isinstance(chosen, ApiProtocol):
        return chosen
    if request.url_rule is not None:
        return native.protocol
    protocols = [each for each in blueprints.values() if isinstance(each, ApiProtocol)]
    below = {
        path: each for each in protocols for path in each.paths if f"{request.path}/".startswith(f"{path}/")
    }
    return below[max(below, key=len)] if below else native.protocol
