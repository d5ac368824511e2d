"""Asks every request for a key where keys are set, but for the health routes and the pages' own files."""

from flask import Flask, Response, request

from embedding_service.errors import Unauthorized
from embedding_service.web.context import KEY
from embedding_service.web.keys import KeyRing

# Route rules, not paths. A browser sends no key with a page it opens; the pages ask their visitor for
# one, and send it with what they ask of the service.
HEALTH = frozenset(
    {"/health", "/health/live", "/health/ready", "/.well-known/live", "/.well-known/ready"},
)
PAGES = frozenset({"/", "/docs", "/docs/<name>"})
PAGE_FILES = "/static/"

CHALLENGE = 'Bearer realm="embedding-service"'


def register(app: Flask) -> None:
    """Attach to the app's requests."""
    settings = app.extensions[KEY].settings
    ring = KeyRing(settings.api_keys, settings.api_keys_file)
    if not ring.required:
        return

    def demand_key() -> None:
        if _is_public() or any(ring.holds(key) for key in _sent_keys()):
            return
        raise Unauthorized(
            "a valid key is needed; send it as 'Authorization: Bearer <key>' or as 'X-API-Key: <key>'"
        )

    app.before_request(demand_key)
    app.after_request(_challenge)


def _is_public() -> bool:
    if request.url_rule is None:
        return False
    rule = request.url_rule.rule
    reads = request.method in ("GET", "HEAD")
    return reads and (rule in HEALTH or rule in PAGES or rule.startswith(PAGE_FILES))


def _sent_keys() -> list[bytes]:
    """What the request offers as a key, at most two; header values are Latin-1 on their way here."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    offered = [request.headers.get("X-API-Key", "")]
    if scheme.lower() == "bearer":
        offered.append(token)
    return [key.strip().encode("latin-1", "replace") for key in offered if key.strip()]


def _challenge(response: Response) -> Response:
    if response.status_code == 401:
        response.headers["WWW-Authenticate"] = CHALLENGE
    return response
