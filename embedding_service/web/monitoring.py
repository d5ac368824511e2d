"""GET /metrics, and the counting of every request by its route rule."""

from flask import Blueprint, Flask, Response, request
from prometheus_client import Counter, Histogram

from embedding_service import metrics
from embedding_service.errors import ServiceError
from embedding_service.web.operation import operation
from embedding_service.web.request import current

blueprint = Blueprint("monitoring", __name__)

# Labels are bounded whatever is sent: a path that no rule matches has this one, a made-up method OTHER.
UNMATCHED, OTHER = "unmatched", "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What is there before it has happened, since a rate needs a zero to rise from. 422 and 424 are what
# Text Embeddings Inference says for 400 and 500.
READING = (200, 401, 500, 503)
WRITING = (200, *sorted({422, 424, *(kind.status for kind in ServiceError.__subclasses__())}))


class RequestCounter:
    """Counts answers; keeps the labelled children, since finding them costs as much as counting."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answer."""
        requests, durations = self.children(route, method, status)
        requests.inc()
        durations.observe(seconds)

    def children(self, route: str, method: str, status: int) -> tuple[Counter, Histogram]:
        """The series with these labels, at 0 where they are new."""
        key = (route, method, status)
        if key not in self._children:
            self._children[key] = (
                metrics.REQUESTS.labels(route, method, str(status)),
                metrics.REQUEST_SECONDS.labels(route, method),
            )
        return self._children[key]


def register(app: Flask) -> None:
    """Count the app's answers. To be called before other hooks are attached: theirs run within."""
    counter = app.extensions["request_counter"] = RequestCounter()

    def end(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule is not None else UNMATCHED
        method = request.method if request.method in METHODS else OTHER
        counter.count(route, method, response.status_code, current().seconds)
        return response

    app.after_request(end)


def prepare(app: Flask) -> None:
    """Make the series of every route. To be called when the last blueprint is registered."""
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
    """All metrics of all processes, in the form that the scraper asks for."""
    body, content_type = metrics.exposition(request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)
