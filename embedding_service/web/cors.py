"""Lets browser pages from the origins in CORS_ORIGINS call the service."""

from flask import Flask, Response, request

from embedding_service.web.context import KEY

# The page sets the key's header itself, so credentials that browsers add by themselves stay forbidden.
METHODS = "GET, POST, OPTIONS"
# Client libraries add headers of their own. The star covers all headers but Authorization.
REQUEST_HEADERS = "Authorization, *"
RESPONSE_HEADERS = (
    "X-Request-ID, traceparent, Retry-After, retry-after-ms, x-compute-tokens, x-total-time, "
    "x-tokenization-time, x-queue-time, x-inference-time, x-cache-hits, x-model, x-truncated-texts"
)
PREFLIGHT_SECONDS = 3600


def register(app: Flask) -> None:
    """Attach to the app. Call this before auth, since a preflight carries no key."""
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
            # Sent for every origin, since a cache may keep the answer for an origin that is allowed.
            response.vary.add("Origin")
            if _allowed(origins):
                response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Expose-Headers"] = RESPONSE_HEADERS
        return response

    app.before_request(answer_preflight)
    app.after_request(allow)


def parse(setting: str) -> frozenset[str]:
    """The origins in CORS_ORIGINS, whose syntax config.py has checked."""
    return frozenset(part.strip().rstrip("/") for part in setting.split(",") if part.strip())


def _allowed(origins: frozenset[str]) -> bool:
    return "*" in origins or request.headers.get("Origin") in origins
