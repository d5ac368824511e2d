"""The current request: its start time, id, deadline, and protocol."""

import random
import re
import time
from types import MappingProxyType
from typing import Any

from flask import Request, has_request_context, request
from werkzeug.utils import cached_property

from embedding_service.engine import Embeddings
from embedding_service.web.context import ServiceContext
from embedding_service.web.protocol import ApiProtocol, Asked

SLASHES = re.compile("/{2,}")
# https://www.w3.org/TR/trace-context/: version, trace, parent, flags; only versions after 00 may append more.
TRACEPARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class ServiceRequest(Request):
    """Flask's request with our own per-request state, which so cannot outlive the request."""

    protocol: ApiProtocol | None = None
    asked: Asked = MappingProxyType({})
    # For the access log and traces: the texts in the request, the tokens read, and the engine's result.
    texts: int | None = None
    tokens: int | None = None
    result: Embeddings | None = None

    def __init__(self, service: ServiceContext, environ: dict[str, Any]) -> None:
        self.began = time.monotonic()
        self.service = service
        if "//" in environ["PATH_INFO"]:
            # The client's base URL ended in a slash. A redirect would turn a POST into a GET in some clients.
            environ["PATH_INFO"] = SLASHES.sub("/", environ["PATH_INFO"])
        super().__init__(environ)

    @cached_property
    def id(self) -> str:
        """The caller's id if it is well-formed, else a new one."""
        given: str | None = self.environ.get("HTTP_X_REQUEST_ID")
        # Unique but not secret: the operating system's random numbers would cost a system call.
        return given if given and SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"

    @property
    def deadline(self) -> float:
        """When the response is due, on the clock of time.monotonic()."""
        return self.began + self.service.settings.request_timeout_seconds

    @property
    def seconds(self) -> float:
        """Seconds since the request began."""
        return time.monotonic() - self.began

    @property
    def trace_id(self) -> str | None:
        """The id of the trace that this request is part of: the caller's, or if spans are sent, a new one."""
        return self.callers_trace_id or (self.new_trace_id if self.service.sends_traces else None)

    @cached_property
    def new_trace_id(self) -> str:
        """The id of a trace that begins with this request."""
        return f"{random.getrandbits(128):032x}"

    @property
    def callers_trace_id(self) -> str | None:
        """The trace id in the caller's W3C `traceparent` header."""
        given: str | None = self.environ.get("HTTP_TRACEPARENT")
        found = TRACEPARENT.fullmatch(given) if given else None
        return found[1] if found and found[1] != "0" * 32 and found[2] != "0" * 16 else None


def current() -> ServiceRequest:
    """The current request itself: each access through Flask's proxy costs as much as this."""
    found: ServiceRequest = request._get_current_object()  # type: ignore[attr-defined]
    return found


def current_trace_id() -> str | None:
    """The trace id of the current request; None outside a request, or if there is no trace."""
    return current().trace_id if has_request_context() else None


def current_id() -> str | None:
    """The id of the current request; None outside a request."""
    return current().id if has_request_context() else None
