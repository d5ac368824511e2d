"""Serves with gunicorn or, where it cannot run (Windows), with Werkzeug and the model in this process."""

import importlib.util
import os
from typing import Any

from embedding_service.settings import environment


def serve() -> None:
    """Serve until told to stop. Raises ConfigError or StartupError, or SystemExit once gunicorn runs."""
    settings = environment.current().settings
    if os.name == "posix" and importlib.util.find_spec("gunicorn"):
        _serve_with_gunicorn()
    from embedding_service.server.app import build

    build().run(settings.host, settings.port, threaded=True)


def _serve_with_gunicorn() -> None:
    """Run gunicorn in this process, with our configuration instead of sys.argv."""
    from gunicorn.app.base import Application

    class Service(Application):  # type: ignore[misc]
        def load_config(self) -> None:
            self.load_config_from_module_name_or_filename("python:embedding_service.server.gunicorn_conf")
            extra = self.cfg.parser().parse_args(self.cfg.get_cmd_args_from_env())
            for name, value in vars(extra).items():
                if value is not None and name != "args":
                    self.cfg.set(name, value)

        def load(self) -> Any:
            from embedding_service.server.app import build

            return build()

    Service().run()
