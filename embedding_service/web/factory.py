"""create_app: the Flask application over an engine."""

from flask import Flask

from embedding_service.engine import Engine
from embedding_service.web import error_handlers, health, page, request_ids
from embedding_service.web.context import Context, install
from embedding_service.web.protocols import native
from embedding_service.web.settings import WebSettings


def create_app(engine: Engine, settings: WebSettings) -> Flask:
    """The WSGI application; `engine` answers, `settings` bounds what is asked of it."""
    app = Flask("embedding_service", static_folder=None)
    app.url_map.strict_slashes = False
    install(app, Context(engine, settings))
    request_ids.register(app)
    error_handlers.register(app)
    app.register_blueprint(page.blueprint)
    app.register_blueprint(health.blueprint)
    app.register_blueprint(native.blueprint)
    return app
