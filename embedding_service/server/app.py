"""Builds the Flask app: reads the settings, chooses an engine, and connects the two."""

import logging

import msgspec
from flask import Flask

from embedding_service.inference.local import LocalEngine
from embedding_service.inference.settings import ModelSettings
from embedding_service.observability import logs
from embedding_service.server import preflight
from embedding_service.settings import environment
from embedding_service.sharing import supervisor_handle
from embedding_service.sharing.client import RemoteEngine
from embedding_service.sharing.settings import LogSettings
from embedding_service.web.factory import create_app
from embedding_service.web.keys import OPEN_WARNING, KeyRing
from embedding_service.web.settings import WebSettings


def build() -> Flask:
    """The app, on top of the gunicorn master's model processes or a model in this process."""
    started = environment.current()
    settings = started.settings
    supervisor = supervisor_handle.inherited()
    engine: RemoteEngine | LocalEngine
    if supervisor is not None:
        engine = RemoteEngine(supervisor, len(settings.devices))
    else:
        logs.setup(*msgspec.structs.astuple(msgspec.convert(settings, LogSettings, from_attributes=True)))
        log = logging.getLogger("embedding_service")
        for warning in started.warnings:
            log.warning(warning)
        KeyRing(settings.api_keys, settings.api_keys_file).check()
        if settings.is_open_at(settings.host):
            log.warning(OPEN_WARNING, settings.host)
        model = msgspec.convert(settings, ModelSettings, from_attributes=True)
        preflight.check_model(model)
        preflight.check_traces(started.sends_traces)
        engine = LocalEngine(model)
    web = msgspec.convert(settings, WebSettings, from_attributes=True)
    return create_app(engine, msgspec.structs.replace(web, traces=started.sends_traces))
