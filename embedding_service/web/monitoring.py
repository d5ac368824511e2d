"""GET /metrics, and request counts by route rule."""

from typing import Any

from flask import Blueprint, Flask, Response, request

from embedding_service.errors import ServiceError
from embedding_service.observability import metrics, multiprocess
from embedding_service.web.operation import operation
from embedding_service.web.request import current

blueprint = Blueprint("monitoring", __name__)

# Labels for unmatched paths and unknown methods, which keep the number of series bounded.
UNMATCHED, OTHER = "unmatched", "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Series for these are created at 0, so that rate() counts the first such response. Text Embeddings Inference
# uses 422 and 424 for 400 and 500.
READING = (200, 401, 500, 503)
WRITING = (200, *sorted({422, 424, *(kind.status for kind in ServiceError.__subclasses__())}))


class RequestCounter:
    """Counts responses. It caches the labelled children, since a lookup costs as much as counting."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str, int], tuple[Any, metrics.Distribution]] = {}

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one response."""
        requests, durations = self.children(route, method, status)
        multiprocess.add(((requests, 1.0), *durations.amounts(seconds)))

    def children(self, route: str, method: str, status: int) -> tuple[Any, metrics.Distribution]:
        """The series with these labels, created at 0 if new."""
        key = (route, method, status)
        if key not in self._children:
            self._children[key] = (
                metrics.REQUESTS.labels(route, method, str(status))._value,
                metrics.Distribution(metrics.REQUEST_SECONDS.labels(route, method)),
            )
        return self._children[key]


def register(app: Flask) -> None:
    """Count the app's responses. Call this before other hooks are attached, so that it wraps them."""
    counter = app.extensions["request_counter"] = RequestCounter()

    def end(response: Response) -> Response:
        request = current()
        route = request.url_rule.rule if request.url_rule is not None else UNMATCHED
        method = request.method if request.method in METHODS else OTHER
        counter.count(route, method, response.status_code, request.seconds)
        return response

    app.after_request(end)


def prepare(app: Flask) -> None:
    """Create the series of every route. Call this once all blueprints are registered."""
    counter: RequestCounter = app.extensions["request_counter"]
    for rule in app.url_map.iter_rules():
        for method in (rule.methods or set()) & {"GET", "POST"}:
            for status in READING if method == "GET" else WRITING:
                counter.children(rule.rule, method, status)
    for method in ("GET", "POST"):
        for status in (401, 404, 405):
            counter.children(UNMATCHED, method, status)


@blueprint.get("/metrics")
@operation({200: str}, media=("text/plain", "application/openmetrics-text"))
def scrape() -> Response:
    """All metrics of all processes, in the format that the scraper asks for."""
    body, content_type = metrics.exposition(request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)
