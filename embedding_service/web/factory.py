"""create_app: the Flask application over an engine."""

from flask import Flask

from embedding_service.engine import Engine
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
from embedding_service.web.settings import WebSettings


def create_app(engine: Engine, settings: WebSettings) -> Flask:
    """The WSGI application: `engine` does the embedding, `settings` holds the limits."""
    app = Flask("embedding_service", static_folder=None)
    app.request_class = ServiceRequest
    app.url_map.strict_slashes = False
    install(app, ServiceContext(engine, settings))
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
