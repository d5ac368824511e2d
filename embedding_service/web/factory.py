"""create_app: the Flask application over an engine."""

from functools import partial
from typing import Any

import msgspec
from flask import Flask, Request, Response
from flask.sessions import NullSession, SessionInterface, SessionMixin
from werkzeug.routing import MapAdapter, Rule

from embedding_service.engine import Engine
from embedding_service.observability import logs, metrics
from embedding_service.settings.config import Config
from embedding_service.web import (
    access_log,
    auth,
    cors,
    error_handlers,
    health,
    monitoring,
    page,
    tracing,
)
from embedding_service.web.context import (
    ServiceContext,
    ServiceRequest,
    current,
    current_id,
    current_trace_id,
)
from embedding_service.web.protocols import clouds, cohere, native, ollama, openai, tei, weaviate


class NoSessions(SessionInterface):
    """No request has a session."""

    null = NullSession()

    def open_session(self, app: Flask, request: Request) -> SessionMixin:
        return self.null


class ServiceApp(Flask):
    """Flask without coroutines, sessions and signals, and with any host: these cost as much as a view."""

    session_interface = NoSessions()

    def __init__(self, service: ServiceContext) -> None:
        super().__init__("embedding_service", static_folder=None)
        self.request_class = partial(ServiceRequest, service)  # type: ignore[assignment]
        self.url_map.strict_slashes = False
        self.extensions["embedding_service"] = service
        # The routes without arguments, by method and path.
        self.plain_routes: dict[tuple[str, str], Rule] = {}

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match the path alone, whatever the host; a plain route needs no matching."""
        if request is None:
            return None
        request.url_rule = self.plain_routes.get((request.method, request.path))
        if request.url_rule is not None:
            request.view_args = {}
            return None
        return self.url_map.bind("", request.root_path, "", "http", request.method, request.path)

    def full_dispatch_request(self, *context: Any) -> Response:
        """Answer the current request with its id, and count it. Every view returns a Response."""
        request = current()
        rule = request.url_rule
        try:
            response: Any = self.preprocess_request(*context) if self.before_request_funcs else None
            if response is None and rule is not None and request.method != "OPTIONS":
                response = self.view_functions[rule.endpoint](**request.view_args or {})
            elif response is None:
                response = self.dispatch_request(*context)
        except Exception as error:
            response = self.make_response(self.handle_user_exception(*context, error))  # type: ignore[call-arg]
        for end in reversed(self.after_request_funcs.get(None, ())):
            response = end(response)
        response.headers.add("X-Request-ID", request.id)
        if "HTTP_TRACEPARENT" in request.environ and request.callers_trace_id is not None:
            response.headers.setdefault("traceparent", request.environ["HTTP_TRACEPARENT"])
        result = request.result
        metrics.record_request(
            (rule.rule if rule is not None else monitoring.UNMATCHED, request.method, response.status_code),
            request.seconds,
            msgspec.structs.astuple(result.timings) if result is not None else (),
            len(result.truncated) if result is not None else 0,
        )
        return response  # type: ignore[no-any-return]


def create_app(engine: Engine, settings: Config, *, sends_traces: bool = False) -> Flask:
    """The WSGI application: `engine` does the embedding, `settings` holds the limits."""
    app = ServiceApp(ServiceContext(engine, settings, sends_traces=sends_traces))
    logs.request_id, logs.trace_id = current_id, current_trace_id
    access_log.register(app, settings)
    if sends_traces:
        tracing.register(app)
    if settings.cors_origins:
        cors.register(app)
    auth.register(app, settings)
    error_handlers.register(app)
    for blueprint in (page.blueprint, health.blueprint, monitoring.blueprint):
        app.register_blueprint(blueprint)
    for module in (native, openai, tei, ollama, weaviate, cohere, clouds):
        app.register_blueprint(module.protocol)
    clouds.serve_vertex_routes(app, settings)
    monitoring.prepare(app)
    for rule in app.url_map.iter_rules():
        if not rule.arguments:
            # The answer to OPTIONS lists the methods of all rules of the path.
            app.plain_routes |= {(each, rule.rule): rule for each in (rule.methods or set()) - {"OPTIONS"}}
    return app
