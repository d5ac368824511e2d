"""create_app: the Flask application over an engine."""

from functools import partial
from typing import Any

from flask import Flask, Request
from flask.sessions import NullSession, SessionInterface, SessionMixin
from werkzeug.routing import MapAdapter

from embedding_service.engine import Engine
from embedding_service.settings.config import Config
from embedding_service.web import (
    access_log,
    auth,
    cors,
    docs,
    error_handlers,
    health,
    monitoring,
    page,
    request_ids,
    tracing,
)
from embedding_service.web.context import ServiceContext, install
from embedding_service.web.protocols import clouds, cohere, native, ollama, openai, tei, weaviate
from embedding_service.web.request import ServiceRequest


class ServiceApp(Flask):
    """Flask without coroutines, sessions and URLs built from a host, which cost as much as a view."""

    def ensure_sync(self, func: Any) -> Any:
        """The function: none is a coroutine."""
        return func

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match the path alone, whatever the host."""
        if request is None:
            return None
        return self.url_map.bind("", request.root_path, "", "http", request.method, request.path)


class NoSessions(SessionInterface):
    """No request has a session."""

    null = NullSession()

    def open_session(self, app: Flask, request: Request) -> SessionMixin:
        return self.null

    def is_null_session(self, obj: object) -> bool:
        return True


def create_app(engine: Engine, settings: Config, *, sends_traces: bool = False) -> Flask:
    """The WSGI application: `engine` does the embedding, `settings` holds the limits."""
    app = ServiceApp("embedding_service", static_folder=None)
    app.session_interface = NoSessions()
    app.url_map.strict_slashes = False
    service = ServiceContext(engine, settings, sends_traces=sends_traces)
    app.request_class = partial(ServiceRequest, service)  # type: ignore[assignment]
    install(app, service)
    monitoring.register(app)
    request_ids.register(app)
    access_log.register(app)
    tracing.register(app)
    cors.register(app)
    auth.register(app)
    error_handlers.register(app)
    app.register_blueprint(page.blueprint)
    app.register_blueprint(health.blueprint)
    app.register_blueprint(monitoring.blueprint)
    app.register_blueprint(docs.blueprint)
    for module in (native, openai, tei, ollama, weaviate, cohere, clouds):
        app.register_blueprint(module.protocol)
    clouds.serve_vertex_routes(app, settings)
    monitoring.prepare(app)
    return app
