"""create_app: the Flask application over an engine."""

from functools import partial
from typing import Any

import msgspec
from flask import Flask, Request
from flask.ctx import RequestContext
from flask.globals import _cv_app, _cv_request
from flask.sessions import NullSession
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
    current_id,
    current_trace_id,
)
from embedding_service.web.protocols import clouds, cohere, native, ollama, openai, tei, weaviate

NO_SESSION = NullSession()


class ServiceApp(Flask):
    """Flask without coroutines, sessions, signals and teardown functions, and with any host.

    These cost as much as a view. The contexts are those of Flask 3.1; a later one has others.
    """

    def __init__(self, service: ServiceContext) -> None:
        super().__init__("embedding_service", static_folder=None)
        self.request_class = partial(ServiceRequest, service)  # type: ignore[assignment]
        self.url_map.strict_slashes = False
        self.extensions["embedding_service"] = service
        # The routes without arguments, by method and path.
        self.plain_routes: dict[tuple[str, str], Rule] = {}
        self._own_context = self.app_context()

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match the path alone, whatever the host; a plain route needs no matching."""
        if request is None:
            return None
        request.url_rule = self.plain_routes.get((request.method, request.path))
        if request.url_rule is not None:
            request.view_args = {}
            return None
        return self.url_map.bind("", request.root_path, "", "http", request.method, request.path)

    def wsgi_app(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer a request with its id, and count it. Every view returns a Response."""
        context = RequestContext(self, environ, session=NO_SESSION)
        request: Any = context.request
        before = _cv_app.set(self._own_context), _cv_request.set(context)
        try:
            try:
                if context.url_adapter is not None:
                    context.match_request()
                response: Any = self.preprocess_request() if self.before_request_funcs else None
                if response is None and request.url_rule is not None and request.method != "OPTIONS":
                    response = self.view_functions[request.url_rule.endpoint](**request.view_args)
                elif response is None:
                    response = self.dispatch_request()
            except Exception as error:
                response = self.make_response(self.handle_user_exception(error))
            for end in reversed(self.after_request_funcs.get(None, ())):
                response = end(response)
            response.headers.add("X-Request-ID", request.id)
            if "HTTP_TRACEPARENT" in environ and request.callers_trace_id is not None:
                response.headers.setdefault("traceparent", environ["HTTP_TRACEPARENT"])
            route = monitoring.UNMATCHED if request.url_rule is None else request.url_rule.rule
            metrics.record_request(
                (route, request.method, response.status_code),
                request.seconds,
                () if request.result is None else msgspec.structs.astuple(request.result.timings),
                0 if request.result is None else len(request.result.truncated),
            )
            return response(environ, start_response)
        finally:
            _cv_app.reset(before[0])
            _cv_request.reset(before[1])


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
