"""Reads what a process is started with, once: its environment, `.env` and the command line's settings."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from embedding_service.settings import config, env_file, tei_names
from embedding_service.words import nearest

# The folder of app.py, in a checkout.
PROJECT = Path(__file__).parent.parent.parent


# The settings, and names of other software and of embed_file that are only similar.
KNOWN = {*config.NAMES, *config.OLD_NAMES.values(), "API_KEY", "PROMPT"}


class Environment(msgspec.Struct, frozen=True):
    """All variables, warnings about them, and those of `.env` that libraries look for in os.environ."""

    variables: Mapping[str, str]
    warnings: tuple[str, ...]
    exports: Mapping[str, str]

    @property
    def settings(self) -> config.Config:
        """The service's settings. Raises ConfigError."""
        return config.load(self.variables)

    @property
    def client_api_key(self) -> str | None:
        """The key that embed_file sends, from API_KEY; the service itself reads API_KEYS."""
        return self._first("API_KEY") or None

    @property
    def sends_traces(self) -> bool:
        """Whether OpenTelemetry's own variables name a collector to send traces to."""
        is_off = self._first("OTEL_SDK_DISABLED").lower() == "true"
        return not is_off and bool(
            self._first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        )

    @property
    def traces_protocol(self) -> str:
        """The protocol that OpenTelemetry's own variables ask for; empty if they do not say."""
        return self._first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

    def _first(self, *names: str) -> str:
        """The value of the first of these variables that is set, else empty."""
        return next((value for name in names if (value := self.variables.get(name, "").strip())), "")


def read(environ: Mapping[str, str], **arguments: str) -> Environment:
    """Add to `environ` the variables of `.env` (from the working folder, else beside app.py).

    `arguments` win over `environ`, and both win over `.env`. Raises ConfigError if `.env` is invalid.
    """
    places = [Path(), PROJECT] if (PROJECT / "app.py").is_file() else [Path()]
    file = env_file.find(places)
    written = env_file.read(file, environ) if file is not None else {}
    variables = written | dict(environ) | arguments
    translated, lines = tei_names.translate(variables, arguments)
    variables |= translated
    warnings = [
        f"{file if name in written else 'the environment'}: {name} is not a setting of this service and has "
        f"no effect; did you mean {meant}?"
        for name in (*(environ.keys() - written.keys()), *written)
        if name not in KNOWN and (meant := nearest(name, tuple(config.NAMES)))
    ]
    warnings += lines
    if "API_KEY" in written and not (variables.get("API_KEYS") or variables.get("API_KEYS_FILE")):
        warnings.append(f"{file}: API_KEY is the key that embed_file sends; the service requires API_KEYS")
    # Not our settings: after SIGUSR2 the new master reads them from `.env` again.
    read_elsewhere = written | {name: translated[name] for name in translated if name.startswith("OTEL_")}
    exports = {
        name: read_elsewhere[name] for name in read_elsewhere.keys() - environ.keys() - set(config.NAMES)
    }
    return Environment(variables, (*warnings, *config.warnings(variables)), exports)


_current: Environment | None = None


def start(**arguments: str) -> Environment:
    """In an entry point: read the environment, and export what libraries look for. Raises ConfigError."""
    global _current  # noqa: PLW0603
    _current = read(os.environ, **arguments)
    os.environ.update(_current.exports)
    return _current


def current() -> Environment:
    """What this process, or its parent before the fork, was started with. Raises ConfigError."""
    return _current or start()


def log_format() -> str:
    """LOG_FORMAT, even if another setting or `.env` is invalid."""
    variables = _current.variables if _current is not None else os.environ
    return "json" if variables.get("LOG_FORMAT", "").strip().lower() == "json" else "text"
