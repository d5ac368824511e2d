"""Logging for every process of the service: one line per event, with the request id if there is one."""

import atexit
import contextlib
import io
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import orjson

from embedding_service.errors import StartupError
from embedding_service.observability.outside import LockType, SimpleQueue, allocate_lock, start_new_thread
from embedding_service.settings.config import Config


def _no_request() -> None:
    return None


# Returns the id of the request that a line belongs to. In a web worker, the web half replaces it with a
# function that looks at the current request, so nothing has to be set and cleared for each request.
request_id: Callable[[], str | None] = _no_request

# Likewise for the id of the W3C trace that the request is part of.
trace_id: Callable[[], str | None] = _no_request

# Left out of the names of loggers.
PACKAGE = "embedding_service."

# Lines that may wait for a log that hangs, and how long the end of a process may.
MAX_WAITING_LINES, FLUSH_SECONDS = 10_000, 0.25

# A message may contain a caller's text, whose line breaks must not forge a second log line.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO web [request id, trace id] message`, followed by any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        ids = " ".join(filter(None, (request_id(), trace_id())))
        line = (
            f"{_stamp(record)} {record.levelname:<7} {record.name.removeprefix(PACKAGE)} "
            f"{f'[{ids}] ' if ids else ''}{record.getMessage().translate(_CONTROL)}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """The same, as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix(PACKAGE),
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


class Writer:
    """Writes lines in a thread of its own, since a disk or a pipe may hang, and its process must not.

    The thread is the operating system's also in a web worker, where `threading` makes greenlets. The file is
    opened again after logrotate has moved it. Lines go to standard error while the file cannot be written.
    """

    def __init__(self) -> None:
        self.path: str | None = None
        self._file, self._identity = -1, (0, 0)
        self.leave()

    def leave(self) -> None:
        """In a forked child: the parent writes its own lines, and its thread is not here."""
        self._items: SimpleQueue[str | LockType] = SimpleQueue()
        self._is_running = False
        self._dropped = 0
        # When the write in progress began.
        self._began = math.inf

    def put(self, line: str) -> None:
        """Write the line soon; drop it if too many are waiting."""
        if not self._is_running:
            self._is_running = True
            start_new_thread(self._write_forever, ())
        if self._items.qsize() < MAX_WAITING_LINES:
            self._items.put(line)
        else:
            self._dropped += 1

    def flush(self) -> None:
        """Wait for the lines so far, but not long: this process is about to end."""
        is_stuck = time.monotonic() - self._began > FLUSH_SECONDS
        if self._is_running and not is_stuck:
            written = allocate_lock()
            written.acquire()
            self._items.put(written)
            written.acquire(timeout=FLUSH_SECONDS)

    def _write_forever(self) -> None:
        while True:
            item = self._items.get()
            if not isinstance(item, str):
                item.release()
                continue
            dropped, self._dropped = self._dropped, 0
            if dropped:
                item = f"{dropped} log lines were dropped, since the log could not be written in time\n{item}"
            data = f"{item}\n".encode(errors="backslashreplace")
            self._began = time.monotonic()
            try:
                _write(self._opened() if self.path else _stream().fileno(), data)
            except OSError:
                with contextlib.suppress(OSError):
                    _write(_stream().fileno(), data)
            self._began = math.inf

    def _opened(self) -> int:
        assert self.path is not None
        with contextlib.suppress(FileNotFoundError):
            facts = Path(self.path).stat()
            if (facts.st_dev, facts.st_ino) == self._identity:
                return self._file
        if self._file >= 0:
            os.close(self._file)
        self._file = _open(self.path)
        facts = os.fstat(self._file)
        self._identity = facts.st_dev, facts.st_ino
        return self._file


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


writer = Writer()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=writer.leave)
atexit.register(writer.flush)


class Handler(logging.Handler):
    """Formats a record at once, where its request is known, and leaves the line to the writer."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            writer.put(self.format(record))
        except Exception:
            self.handleError(record)


def check(settings: Config) -> None:
    """Raises StartupError if the log file cannot be written."""
    if settings.log_file:
        # Only writing a line detects a full disk.
        record = logging.LogRecord(__name__, logging.INFO, "", 0, "The service logs here", None, None)
        try:
            log = _open(settings.log_file)
            _write(log, f"{_formatter(settings.log_format).format(record)}\n".encode())
            os.close(log)
        except OSError as error:
            raise StartupError(
                f"LOG_FILE={settings.log_file!r} cannot be written: {error.strerror}"
            ) from None


def setup(settings: Config) -> None:
    """Configure logging in this process."""
    level, writer.path = settings.log_level, settings.log_file
    handler = Handler()
    handler.setFormatter(_formatter(settings.log_format))
    logging.root.handlers = [handler]
    logging.root.setLevel("DEBUG" if level == "debug" else "WARNING")
    for name in ("embedding_service", "stdout", "gunicorn.error"):
        logging.getLogger(name).setLevel(level.upper())
    gunicorn = logging.getLogger("gunicorn.error")
    gunicorn.handlers, gunicorn.propagate = [], True
    logging.captureWarnings(True)
    sys.excepthook, threading.excepthook = _log_uncaught, _log_uncaught_in_thread
    if settings.log_format == "json":
        for name, priority in (("stdout", logging.INFO), ("stderr", logging.WARNING)):
            stream = getattr(sys, name)
            if not isinstance(stream, LineLogger):
                setattr(sys, name, LineLogger(name, priority, stream))


def _formatter(form: str) -> logging.Formatter:
    return JsonFormatter() if form == "json" else TextFormatter()


def refuse(error: object, form: str) -> None:
    """Report on standard error why the service does not start, even if logging is not set up."""
    writer.flush()
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
