"""The entry point: settings, an engine, the Flask app over it; `python app.py` serves it with gunicorn."""

import importlib.util
import logging
import os
import sys
from pathlib import Path

import msgspec
from flask import Flask

import config
from embedding_service import logs
from embedding_service.errors import StartupError
from embedding_service.inference.local import LocalEngine
from embedding_service.inference.settings import ModelSettings
from embedding_service.sharing.client import RemoteEngine
from embedding_service.sharing.settings import EX_CONFIG, LogSettings, socket_path
from embedding_service.sharing.supervision import stop_master
from embedding_service.web.factory import create_app
from embedding_service.web.keys import OPEN_WARNING, KeyRing
from embedding_service.web.settings import WebSettings

HERE = Path(__file__).parent


def build() -> Flask:
    """The app over the model process that gunicorn.conf.py started, or over a model of its own."""
    settings = config.load()
    folder = config.runtime_folder()
    engine: RemoteEngine | LocalEngine
    if folder is not None:
        paths = [socket_path(folder, index) for index in range(len(settings.devices))]
        engine = RemoteEngine(folder, paths, lambda: stop_master(folder))
    else:
        logs.setup(*msgspec.structs.astuple(msgspec.convert(settings, LogSettings, from_attributes=True)))
        KeyRing(settings.api_keys, settings.api_keys_file).check()
        if settings.is_open_at(settings.host):
            logging.getLogger("embedding_service").warning(OPEN_WARNING, settings.host)
        engine = LocalEngine(msgspec.convert(settings, ModelSettings, from_attributes=True))
    return create_app(engine, msgspec.convert(settings, WebSettings, from_attributes=True))


def serve() -> None:
    """Become gunicorn; where it cannot run (Windows), serve with Werkzeug and the model in this process."""
    settings = config.load()
    if os.name == "posix" and importlib.util.find_spec("gunicorn"):
        arguments = [
            "-m",
            "gunicorn",
            "--chdir",
            str(HERE),
            "--config",
            str(HERE / "gunicorn.conf.py"),
            "app:app",
        ]
        os.execv(sys.executable, [sys.executable, *arguments])
    build().run(settings.host, settings.port, threaded=True)


if __name__ == "__main__":
    try:
        serve()
    except (config.ConfigError, StartupError) as error:
        print(error, file=sys.stderr)
        sys.exit(EX_CONFIG)
else:
    app = build()
