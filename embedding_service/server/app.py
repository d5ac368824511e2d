"""Builds the Flask app: reads the settings, chooses an engine, and connects the two."""

import logging

from flask import Flask

from embedding_service.engine import Engine
from embedding_service.observability import logs
from embedding_service.server import preflight
from embedding_service.settings import environment
from embedding_service.sharing import supervisor_handle
from embedding_service.sharing.client import RemoteEngine
from embedding_service.web.factory import create_app
from embedding_service.web.keys import OPEN_WARNING


def build() -> Flask:
    """The app, on top of the gunicorn master's model processes or a model in this process."""
    started = environment.current()
    settings = started.settings
    supervisor = supervisor_handle.inherited()
    engine: Engine
    if supervisor is not None:
        engine = RemoteEngine(supervisor, settings.devices)
    else:
        logs.check(settings)
        logs.setup(settings)
        preflight.check(started)
        if settings.is_open_at(settings.host):
            logging.getLogger(__name__).warning(OPEN_WARNING, settings.host)
        # Web workers need none of it.
        from embedding_service.inference.local import LocalEngine

        engine = LocalEngine(settings)
    return create_app(engine, settings, sends_traces=started.sends_traces)
