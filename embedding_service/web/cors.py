"""Lets pages of other origins call the service from a browser, if CORS_ORIGINS names them."""

from flask import Flask, Response, request

from embedding_service.web.context import KEY

# A key is sent in a header that the page sets, so credentials that a browser adds by itself stay forbidden.
METHODS = "GET, POST, OPTIONS"
# Client packages add headers of their own. The star stands for all but Authorization.
REQUEST_HEADERS = "Authorization, *"
RESPONSE_HEADERS = (
    "X-Request-ID, Retry-After, retry-after-ms, x-compute-tokens, x-total-time, x-tokenization-time, "
    "x-queue-time, x-inference-time, x-cache-hits, x-model, x-truncated-texts"
)
PREFLIGHT_SECONDS = 3600


def register(app: Flask) -> None:
    """Attach to the app, before auth: a preflight carries no key."""
    origins = parse(app.extensions[KEY].settings.cors_origins)
    if not origins:
        return

    def answer_preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        response = Response(status=204)
        if _allowed(origins):
            response.headers["Access-Control-Allow-Methods"] = METHODS
            response.headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
            response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return response

    def allow(response: Response) -> Response:
        if "*" in origins:
            response.headers["Access-Control-Allow-Origin"] = "*"
        else:
            # Also for an origin that is not allowed, since a cache may keep the answer for one that is.
            response.vary.add("Origin")
            if _allowed(origins):
                response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Expose-Headers"] = RESPONSE_HEADERS
        return response

    app.before_request(answer_preflight)
    app.after_request(allow)


def parse(setting: str) -> frozenset[str]:
    """The origins in CORS_ORIGINS, whose form config.py has checked."""
    return frozenset(part.strip().rstrip("/") for part in setting.split(",") if part.strip())


def _allowed(origins: frozenset[str]) -> bool:
    return "*" in origins or request.headers.get("Origin") in origins
