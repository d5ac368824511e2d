"""GET /metrics, and the counting of every request by its route rule."""

import time

from flask import Blueprint, Flask, Response, g, request
from prometheus_client import Counter, Histogram

from embedding_service import metrics
from embedding_service.errors import ServiceError

blueprint = Blueprint("monitoring", __name__)

# Labels are bounded whatever is sent: a path that no rule matches has this one, a made-up method OTHER.
UNMATCHED, OTHER = "unmatched", "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What is there before it has happened, since a rate needs a zero to rise from.
READING = (200, 401, 500, 503)
WRITING = tuple(sorted({200, *(kind.status for kind in ServiceError.__subclasses__())}))


class RequestCounter:
    """Counts answers; keeps the labelled children, since finding them costs as much as counting."""

    def __init__(self) -> None:
        self._counters = dict[tuple[str, str, int], Counter]()
        self._durations = dict[str, Histogram]()

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self.counter(route, method, status).inc()
        self.duration(route).observe(seconds)

    def counter(self, route: str, method: str, status: int) -> Counter:
        """The counter with these labels, at 0 if it is new."""
        key = (route, method, status)
        if key not in self._counters:
            self._counters[key] = metrics.REQUESTS.labels(route, method, str(status))
        return self._counters[key]

    def duration(self, route: str) -> Histogram:
        """The histogram with this label, empty if it is new."""
        if route not in self._durations:
            self._durations[route] = metrics.REQUEST_SECONDS.labels(route)
        return self._durations[route]


def register(app: Flask) -> None:
    """Count the app's answers. To be called before other hooks are attached: theirs run within."""
    counter = RequestCounter()

    def begin() -> None:
        g.began = time.perf_counter()

    def end(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule is not None else UNMATCHED
        method = request.method if request.method in METHODS else OTHER
        counter.count(route, method, response.status_code, time.perf_counter() - g.began)
        return response

    app.before_request(begin)
    app.after_request(end)
    app.extensions["request_counter"] = counter


def prepare(app: Flask) -> None:
    """Make the series of every route. To be called when the last blueprint is registered."""
    counter: RequestCounter = app.extensions["request_counter"]
    for rule in app.url_map.iter_rules():
        counter.duration(rule.rule)
        for method in (rule.methods or set()) & {"GET", "POST"}:
            for status in READING if method == "GET" else WRITING:
                counter.counter(rule.rule, method, status)
    counter.duration(UNMATCHED)
    for method in ("GET", "POST"):
        for status in (401, 404, 405):
            counter.counter(UNMATCHED, method, status)


@blueprint.get("/metrics")
def scrape() -> Response:
    """All metrics of all processes, in the form that the scraper asks for."""
    body, content_type = metrics.exposition(request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)
