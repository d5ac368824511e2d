"""Lets browser pages from the origins in CORS_ORIGINS call the service."""

import functools
import re
from collections.abc import Iterable

from flask import Flask, Response, request

# The page sets the key's header itself, so credentials that browsers add by themselves stay forbidden.
METHODS = "GET, POST, OPTIONS"
# Client libraries add headers of their own. The star covers all headers but Authorization.
REQUEST_HEADERS = "Authorization, *"
RESPONSE_HEADERS = (
    "X-Request-ID, traceparent, Retry-After, retry-after-ms, x-compute-tokens, x-total-time, "
    "x-tokenization-time, x-queue-time, x-inference-time, x-cache-hits, x-model, x-truncated-texts, "
    "x-model-fingerprint, x-compute-characters, x-compute-time"
)
PREFLIGHT_SECONDS = 3600


# Browsers leave out the port that the scheme has anyway.
DEFAULT_PORT = re.compile("^(http:.*):80$|^(https:.*):443$")


def register(app: Flask) -> None:
    """Attach to the app. Call this before auth, since a preflight carries no key."""

    def answer_preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        response = Response(status=204)
        if "Access-Control-Allow-Origin" in dict(permissions(app, request.headers.get("Origin", ""))):
            response.headers["Access-Control-Allow-Methods"] = METHODS
            response.headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
            response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return response

    def allow(response: Response) -> Response:
        for name, value in permissions(app, request.headers.get("Origin", "")):
            response.headers.add(name, value)
        return response

    app.before_request(answer_preflight)
    app.after_request(allow)


def permissions(app: Flask, origin: str) -> Iterable[tuple[str, str]]:
    """The headers that let a page of this origin, as its browser sends it, read a response."""
    setting = app.extensions["embedding_service"].settings.cors_origins
    if not setting:
        return
    if setting == "*":
        yield "Access-Control-Allow-Origin", "*"
    else:
        # Sent for every origin, since a cache may keep the answer for an origin that is allowed.
        yield "Vary", "Origin"
        if allowed(setting).fullmatch(origin):
            yield "Access-Control-Allow-Origin", origin
    yield "Access-Control-Expose-Headers", RESPONSE_HEADERS


@functools.cache
def allowed(setting: str) -> re.Pattern[str]:
    """What matches the origins in CORS_ORIGINS, whose syntax config.py has checked."""
    return re.compile("|".join(_pattern(part.strip().lower()) for part in setting.split(",")))


def _pattern(origin: str) -> str:
    """In `https://*.example.com` the star is one or more labels, in `http://localhost:*` any port or none."""
    plain = DEFAULT_PORT.sub(r"\1\2", re.sub("(?<!/)/$", "", origin))
    return re.escape(plain).replace(r"://\*\.", r"://([^./:]+\.)+").replace(r":\*", r"(:\d+)?")
