"""Logging for every process of the service: one line per event, with the request id if there is one."""

import io
import logging
import logging.config
import logging.handlers
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import orjson

from embedding_service.errors import StartupError


def _no_request() -> None:
    return None


# Returns the id of the request that a line belongs to. In a web worker, the web half replaces it with a
# function that looks at the current request, so nothing has to be set and cleared for each request.
request_id: Callable[[], str | None] = _no_request

# Likewise for the id of the W3C trace that the request is part of.
trace_id: Callable[[], str | None] = _no_request

# A message may contain a caller's text, whose line breaks must not forge a second log line.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO web [request id, trace id] message`, followed by any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        ids = " ".join(filter(None, (request_id(), trace_id())))
        line = (
            f"{_stamp(record)} {record.levelname:<7} {_short(record.name)} "
            f"{f'[{ids}] ' if ids else ''}{record.getMessage().translate(_CONTROL)}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """The same, as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": _short(record.name),
            "process": record.process,
            "message": record.getMessage(),
        }
        if caller := request_id():
            fields["request_id"] = caller
        if trace := trace_id():
            fields["trace_id"] = trace
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(fields).decode()


class FileHandler(logging.handlers.WatchedFileHandler):
    """A log file that follows logrotate; lines go to standard error while it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=_stream())


def dict_config(level: str, form: str, file: str | None) -> dict[str, Any]:
    """The configuration for `logging.config.dictConfig` and gunicorn's `logconfig_dict`."""
    # WatchedFileHandler reopens the file after logrotate has moved it.
    handler: dict[str, Any] = (
        {"class": "embedding_service.observability.logs.FileHandler", "filename": file, "encoding": "utf-8"}
        if file
        else {"class": "logging.StreamHandler", "stream": _stream()}
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
            "stdout": {"level": level.upper()},
            "gunicorn.error": {"level": level.upper(), "handlers": [], "propagate": True},
        },
    }


def setup(level: str, form: str, file: str | None) -> None:
    """Configure logging in this process. Raises StartupError if the log file cannot be written."""
    config = dict_config(level, form, file)
    if file:
        # Only writing a line detects a full disk.
        formatter = config["formatters"]["line"]["()"]()
        record = logging.LogRecord(__name__, logging.INFO, "", 0, "A process logs here", None, None)
        try:
            with Path(file).open("a", encoding="utf-8") as log:
                log.write(f"{formatter.format(record)}\n")
        except OSError as error:
            raise StartupError(f"LOG_FILE={file!r} cannot be written: {error.strerror}") from None
    logging.config.dictConfig(config)
    logging.captureWarnings(True)
    sys.excepthook, threading.excepthook = _log_uncaught, _log_uncaught_in_thread
    if form == "json":
        _capture()


def refuse(error: object, form: str) -> None:
    """Report on standard error why the service does not start, even if logging is not set up."""
    record = logging.LogRecord("start", logging.CRITICAL, "", 0, "%s", (error,), None)
    print(JsonFormatter().format(record) if form == "json" else error, file=_stream())


def adopt_libraries() -> None:
    """Make the libraries imported so far log through our handler instead of their own."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and not logger.name.startswith("gunicorn"):
            for handler in logger.handlers.copy():
                # But keep its subclasses, which write to files.
                if type(handler) is logging.StreamHandler:
                    logger.removeHandler(handler)
                    logger.propagate = True


class LineLogger(io.TextIOBase):
    """Replaces standard output or error: each line that a library prints becomes a log record."""

    def __init__(self, name: str, level: int, original: TextIO) -> None:
        self.original = original
        self._log, self._level = logging.getLogger(name), level
        # For each thread: its unfinished line, and whether it is inside a logging call.
        self._state = threading.local()

    def write(self, text: str) -> int:
        if getattr(self._state, "busy", False):
            return self.original.write(text)  # the log itself has failed
        *lines, self._state.rest = (getattr(self._state, "rest", "") + text).replace("\r", "\n").split("\n")
        self._state.busy = True
        try:
            for line in lines:
                if line.strip():
                    self._log.log(self._level, "%s", line.rstrip())
        finally:
            self._state.busy = False
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.original.fileno()

    def flush(self) -> None:
        self.original.flush()


def _stream() -> TextIO:
    """The real standard error."""
    return sys.stderr.original if isinstance(sys.stderr, LineLogger) else sys.stderr


def _capture() -> None:
    """Log in our format what Python and libraries print, uncaught exceptions included."""
    for name, level in (("stdout", logging.INFO), ("stderr", logging.WARNING)):
        stream = getattr(sys, name)
        if not isinstance(stream, LineLogger):
            setattr(sys, name, LineLogger(name, level, stream))


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        logging.getLogger("uncaught").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None:
        _log_uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def _stamp(record: logging.LogRecord) -> str:
    """ISO 8601, in UTC, with milliseconds."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _short(name: str) -> str:
    return name.removeprefix("embedding_service.")
