"""Requires a key for requests to views that are not public, if any keys are configured."""

import base64
import contextlib

from flask import Flask, Response, current_app, request

from embedding_service.errors import Unauthorized
from embedding_service.settings.config import Config
from embedding_service.web import keys
from embedding_service.web.route_spec import spec_of

CHALLENGE = 'Bearer realm="embedding-service"'


def register(app: Flask, settings: Config) -> None:
    """Attach to the app's requests."""
    ring = keys.ring(settings.api_keys, settings.api_keys_file)
    if not ring.required:
        return

    def demand_key() -> None:
        if _is_public() or any(ring.holds(key) for key in _sent_keys()):
            return
        raise Unauthorized(
            "a valid key is required; send it as 'Authorization: Bearer <key>', as 'X-API-Key: <key>', "
            "or in the address: http://any:<key>@host"
        )

    app.before_request(demand_key)
    app.after_request(_challenge)


def _is_public() -> bool:
    """Whether the view is public, as pages are: a browser that opens one sends no key."""
    if request.method not in ("GET", "HEAD") or request.endpoint is None:
        return False
    found = spec_of(current_app.view_functions[request.endpoint])
    return found is not None and found.public


def _sent_keys() -> list[bytes]:
    """The keys in the request, at most three; Azure's is `api-key`. WSGI decodes header values as Latin-1."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    offered = [
        request.headers.get(name, "").encode("latin-1", "replace") for name in ("X-API-Key", "api-key")
    ]
    if scheme.lower() == "bearer":
        offered.append(token.encode("latin-1", "replace"))
    elif scheme.lower() == "basic":
        # A client that can send no key gets it in its address: http://any:KEY@host:8001. The name is ignored.
        with contextlib.suppress(ValueError):
            offered.append(base64.b64decode(token.strip()).partition(b":")[2])
    return [key.strip() for key in offered if key.strip()]


def _challenge(response: Response) -> Response:
    if response.status_code == 401:
        response.headers["WWW-Authenticate"] = CHALLENGE
    return response
