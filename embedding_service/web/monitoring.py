"""GET /metrics, and the series that are there from the start."""

from flask import Blueprint, Flask, Response, request

from embedding_service.errors import ServiceError
from embedding_service.observability import metrics
from embedding_service.web.route_spec import RouteSpec

blueprint = Blueprint("monitoring", __name__)

# The route of paths that have none.
UNMATCHED = "unmatched"

# Series for these are created at 0, so that rate() counts the first such response. Text Embeddings Inference
# uses 422 and 424 for 400 and 500.
READING = (200, 401, 500, 503)
WRITING = (200, *sorted({422, 424, *(kind.status for kind in ServiceError.__subclasses__())}))


def prepare(app: Flask) -> None:
    """Create the series of every route."""
    for method in ("GET", "POST"):
        for status in (401, 404, 405):
            metrics.request_series(UNMATCHED, method, status)
        for rule in app.url_map.iter_rules():
            if method in (rule.methods or ()):
                for status in READING if method == "GET" else WRITING:
                    metrics.request_series(rule.rule, method, status)


@blueprint.get("/metrics")
@RouteSpec({200: str}, media=("text/plain", "application/openmetrics-text"))
def scrape() -> Response:
    """All metrics of all processes, in the format that the scraper asks for."""
    body, content_type = metrics.exposition(request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)
