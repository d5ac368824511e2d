"""The current request, and what it needs from the running app: the engine, the limits, its state."""

import random
import re
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import msgspec
from flask import Request, has_request_context, request
from werkzeug.utils import cached_property

from embedding_service import engine
from embedding_service.engine import AnswerT, Embeddings, Engine, ModelInfo, Status, check_characters
from embedding_service.errors import FingerprintMismatch, InvalidRequest, Overloaded, TooLarge, Unavailable
from embedding_service.settings.config import Config
from embedding_service.web.protocol import EMPTY, ApiProtocol, Asked
from embedding_service.web.token_ids import decoder

# Weight of the latest request in the moving average of request times.
LATEST_WEIGHT = 0.1

SLASHES = re.compile("/{2,}")
# https://www.w3.org/TR/trace-context/: version, trace, parent, flags; only versions after 00 may append more.
TRACEPARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
EXPECTED = "HTTP_X_EXPECT_FINGERPRINT"
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class ServiceContext:
    """The engine, with a limit on concurrent requests and a status that shows a shutdown."""

    def __init__(self, engine: Engine, settings: Config, *, sends_traces: bool = False) -> None:
        self.engine = engine
        self.settings = settings
        self.sends_traces = sends_traces
        # Responses show the first; requests may use any of them.
        self.names = [name.strip() for name in (settings.served_model_name or "").split(",") if name.strip()]
        self.decode_ids = decoder(settings.token_ids) if settings.token_ids else None
        self.draining: Callable[[], bool] = lambda: False
        # One item for each further request that may be in flight: a list serves as a non-blocking semaphore.
        self.places = [None] * settings.max_concurrent_requests
        self.seconds_per_request = 0.0
        self._model_name = ""

    @property
    def model_name(self) -> str:
        """The model's name in responses, which stays the same once it is known."""
        if not self._model_name and (info := self.status().info) is not None:
            self._model_name = info.model_name
        return self._model_name

    def status(self) -> Status:
        """The engine's status, or `draining` during a shutdown."""
        status = self.engine.status()
        if self.names and status.info is not None:
            info = msgspec.structs.replace(status.info, model_name=self.names[0])
            status = msgspec.structs.replace(status, info=info)
        if self.draining():
            return Status(state="draining", reason="the service is shutting down", info=status.info)
        return status

    def require_info(self) -> ModelInfo:
        """The loaded model. Raises Unavailable until it is loaded."""
        info = self.engine.status().info
        if info is None:
            raise Unavailable(self.status().reason, retry_after_seconds=1)
        return info if not self.names else msgspec.structs.replace(info, model_name=self.names[0])

    def max_tokens(self, info: ModelInfo) -> int:
        """The maximum number of tokens that the model reads of a text.

        If it does not truncate texts, MAX_TEXT_CHARACTERS is the only limit.
        """
        return self.settings.max_text_characters if info.reads_whole_texts else info.max_seq_length


class ServiceRequest(Request):
    """Flask's request with our own per-request state, which so cannot outlive the request."""

    protocol: ApiProtocol | None = None
    asked: Asked = MappingProxyType({})
    # For the access log and traces: the texts in the request, the tokens read, and the engine's result.
    texts: int | None = None
    tokens: int | None = None
    result: Embeddings | None = None

    def __init__(self, service: ServiceContext, environ: dict[str, Any]) -> None:
        """`id` is the caller's if it is well-formed; `deadline` is on the clock of time.monotonic()."""
        self.began = time.monotonic()
        self.deadline = self.began + service.settings.request_timeout_seconds
        self.service = service
        given: str | None = environ.get("HTTP_X_REQUEST_ID")
        # Unique but not secret: the operating system's random numbers would cost a system call.
        self.id = given if given and SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
        if "//" in environ["PATH_INFO"]:
            # The client's base URL ended in a slash. A redirect would turn a POST into a GET in some clients.
            environ["PATH_INFO"] = SLASHES.sub("/", environ["PATH_INFO"])
        # Unpopulated, since a reference from `environ` to the request would be left for the collector.
        super().__init__(environ, populate_request=False)

    def call(self, asked: engine.Request[AnswerT], *, characters: bool = True) -> AnswerT:
        """The engine's answer.

        Raises InvalidRequest if there are no texts, TooLarge if there are too many, or one has too many
        `characters`, Overloaded if this worker has too many requests in flight, and FingerprintMismatch.
        """
        service, settings, texts = self.service, self.service.settings, asked.texts
        if EXPECTED in self.environ and isinstance(asked, engine.EmbedRequest | engine.TokenVectorsRequest):
            self.fingerprint()
        self.texts = len(texts)
        if not texts:
            raise InvalidRequest(EMPTY, field="texts")
        if len(texts) > settings.max_texts_per_request:
            raise TooLarge(
                f"has {len(texts)} texts; at most {settings.max_texts_per_request} are allowed "
                "(MAX_TEXTS_PER_REQUEST)",
                field="texts",
            )
        if characters and len(max(texts, key=len)) > settings.max_text_characters:
            check_characters(texts, settings.max_text_characters)
        try:
            service.places.pop()
        except IndexError:
            # Half of the requests in flight will be done in about half the time that a request takes.
            raise Overloaded(
                "this web worker is at its limit of concurrent requests",
                retry_after_seconds=max(0.05, service.seconds_per_request / 2),
            ) from None
        began = time.monotonic()
        try:
            return service.engine.call(asked)
        finally:
            service.places.append(None)
            seconds = time.monotonic() - began
            service.seconds_per_request += LATEST_WEIGHT * (seconds - service.seconds_per_request)

    def fingerprint(self) -> str:
        """The model's fingerprint. Raises FingerprintMismatch if the caller expects another one."""
        info = self.service.engine.status().info or self.service.require_info()
        own, expected = info.fingerprint, self.environ.get(EXPECTED)
        if expected is not None and expected != own:
            raise FingerprintMismatch(
                f"the caller expects vectors of a model with the fingerprint {expected[:64]!r}, but this "
                f"model's is {own!r}: their vectors must not be compared"
            )
        return own

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
        parts = TRACEPARENT.fullmatch(given) if given else None
        return parts[1] if parts and parts[1] != "0" * 32 and parts[2] != "0" * 16 else None


def current() -> ServiceRequest:
    """The current request itself: each access through Flask's proxy costs as much as this."""
    own: ServiceRequest = request._get_current_object()  # type: ignore[attr-defined]
    return own


def current_trace_id() -> str | None:
    """The trace id of the current request; None outside a request, or if there is no trace."""
    return current().trace_id if has_request_context() else None


def current_id() -> str | None:
    """The id of the current request; None outside a request."""
    return current().id if has_request_context() else None
