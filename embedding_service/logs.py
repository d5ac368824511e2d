"""Logging for every process of the service: one line per event, with the request id where there is one."""

import logging
import logging.config
import logging.handlers
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from embedding_service.errors import StartupError


def _no_request() -> None:
    return None


# The id of the request that a line belongs to. In a web worker the web half replaces it, by one that
# asks the request under way, so that nothing has to be set at its beginning and cleared at its end.
request_id: Callable[[], str | None] = _no_request

# A caller's text may end up in a message; a line break in it must not forge a second log line.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO web [request id] message`, and a traceback below where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        caller = request_id()
        line = (
            f"{stamp}.{int(record.msecs):03d}Z {record.levelname:<7} {_short(record.name)} "
            f"{f'[{caller}] ' if caller else ''}{record.getMessage().translate(_CONTROL)}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """The same as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": _short(record.name),
            "process": record.process,
            "message": record.getMessage(),
        }
        if caller := request_id():
            fields["request_id"] = caller
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(fields).decode()


class FileHandler(logging.handlers.WatchedFileHandler):
    """A log file that moves with logrotate; while it cannot be written, lines go to standard error."""

    def handleError(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def dict_config(level: str, form: str, file: str | None) -> dict[str, Any]:
    """The settings as `logging.config.dictConfig` and gunicorn's `logconfig_dict` take them."""
    # WatchedFileHandler opens the file anew when logrotate has moved it.
    handler: dict[str, Any] = (
        {"class": "embedding_service.logs.FileHandler", "filename": file, "encoding": "utf-8"}
        if file
        else {"class": "logging.StreamHandler", "stream": sys.stderr}
    )
    handler["formatter"] = "line"
    formatter = JsonFormatter if form == "json" else TextFormatter
    root_level = "DEBUG" if level == "debug" else "WARNING"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {"out": handler},
        "root": {"level": root_level, "handlers": ["out"]},
        "loggers": {
            "embedding_service": {"level": level.upper()},
            "gunicorn.error": {"level": level.upper(), "handlers": [], "propagate": True},
        },
    }


def setup(level: str, form: str, file: str | None) -> None:
    """Configure logging in this process. Raises StartupError where the log file cannot be written."""
    config = dict_config(level, form, file)
    if file:
        # A line is written, since a full disk shows itself only then.
        formatter = config["formatters"]["line"]["()"]()
        record = logging.LogRecord(__name__, logging.INFO, "", 0, "A process logs here", None, None)
        try:
            with Path(file).open("a", encoding="utf-8") as log:
                log.write(f"{formatter.format(record)}\n")
        except OSError as error:
            raise StartupError(f"LOG_FILE={file!r} cannot be written: {error.strerror}") from None
    logging.config.dictConfig(config)


def _short(name: str) -> str:
    return name.removeprefix("embedding_service.")
