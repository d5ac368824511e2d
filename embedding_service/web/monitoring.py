"""GET /metrics, and the series that are there from the start."""

from flask import Blueprint, Flask, Response, current_app, request

from embedding_service.errors import InvalidRequest, ServiceError
from embedding_service.observability import metrics
from embedding_service.web.route_spec import RouteSpec, spec_of

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


def _embedding_routes() -> set[str]:
    views = current_app.view_functions
    specs = {rule.rule: spec_of(views[rule.endpoint]) for rule in current_app.url_map.iter_rules()}
    return {route for route, spec in specs.items() if spec and (spec.embeds or spec.reads_tokens)}


@blueprint.get("/metrics")
@RouteSpec(
    {200: str},
    media=("text/plain", "application/openmetrics-text"),
    query={"names": ["tei"]},
    raises=(InvalidRequest,),
)
def scrape() -> Response:
    """All metrics of all processes, in the format that the scraper asks for, or under TEI's names."""
    names = request.args.get("names")
    if names not in (None, "tei"):
        raise InvalidRequest(f"is {names[:50]!r}; it must be tei, or left out", field="names")
    if names is None:
        body, content_type = metrics.exposition(request.headers.get("Accept", ""))
    else:
        body, content_type = metrics.tei_exposition(_embedding_routes())
    return Response(body, content_type=content_type)
