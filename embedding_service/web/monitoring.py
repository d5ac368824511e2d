"""GET /metrics, and request counts by route rule."""

from typing import Any

from flask import Blueprint, Response, request
from werkzeug.routing import Rule

from embedding_service.errors import ServiceError
from embedding_service.observability import metrics, multiprocess
from embedding_service.web.operation import operation

blueprint = Blueprint("monitoring", __name__)

# Labels for unmatched paths and unknown methods, which keep the number of series bounded.
UNMATCHED, OTHER = "unmatched", "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Series for these are created at 0, so that rate() counts the first such response. Text Embeddings Inference
# uses 422 and 424 for 400 and 500.
READING = (200, 401, 500, 503)
WRITING = (200, *sorted({422, 424, *(kind.status for kind in ServiceError.__subclasses__())}))


class RequestCounter:
    """Counts responses. It caches the labelled series, since a lookup costs as much as counting."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, int], tuple[Any, metrics.Distribution]] = {}
        for method in ("GET", "POST"):
            for status in (401, 404, 405):
                self._create((UNMATCHED, method, status))

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one response."""
        key = (route, method if method in METHODS else OTHER, status)
        series = self._series.get(key) or self._create(key)
        multiprocess.add(((series[0], 1.0), *series[1].amounts(seconds)))

    def prepare(self, rule: Rule) -> None:
        """Create the series of a route."""
        for method in (rule.methods or set()) & {"GET", "POST"}:
            for status in READING if method == "GET" else WRITING:
                self._create((rule.rule, method, status))

    def _create(self, key: tuple[str, str, int]) -> tuple[Any, metrics.Distribution]:
        """The series with these labels, at 0 if new."""
        route, method, status = key
        self._series[key] = created = (
            metrics.REQUESTS.labels(route, method, str(status))._value,
            metrics.Distribution(metrics.REQUEST_SECONDS.labels(route, method)),
        )
        return created


@blueprint.get("/metrics")
@operation({200: str}, media=("text/plain", "application/openmetrics-text"))
def scrape() -> Response:
    """All metrics of all processes, in the format that the scraper asks for."""
    body, content_type = metrics.exposition(request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)
