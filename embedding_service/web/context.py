"""What views need from the running app: the engine, the limits, and whether it is draining."""

import time
from collections.abc import Callable

import msgspec
from flask import Flask, current_app

from embedding_service.engine import AnswerT, Engine, ModelInfo, Request, Status
from embedding_service.errors import Overloaded, Unavailable
from embedding_service.settings.config import Config
from embedding_service.web.token_ids import decoder

KEY = "embedding_service"

# Weight of the latest request in the moving average of request times.
LATEST_WEIGHT = 0.1


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
        self._places = [None] * settings.max_concurrent_requests
        self._seconds_per_request = 0.0
        self._model_name = ""

    def call(self, request: Request[AnswerT]) -> AnswerT:
        """As Engine.call. Raises Overloaded if this worker has too many requests in flight."""
        try:
            self._places.pop()
        except IndexError:
            # Half of the requests in flight will be done in about half the time that a request takes.
            raise Overloaded(
                "this web worker is at its limit of concurrent requests",
                retry_after_seconds=max(0.05, self._seconds_per_request / 2),
            ) from None
        began = time.monotonic()
        try:
            return self.engine.call(request)
        finally:
            self._places.append(None)
            seconds = time.monotonic() - began
            self._seconds_per_request += LATEST_WEIGHT * (seconds - self._seconds_per_request)

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


def install(app: Flask, context: ServiceContext) -> None:
    """Attach the context to the app."""
    app.extensions[KEY] = context


def context() -> ServiceContext:
    """The running app's context."""
    found: ServiceContext = current_app.extensions[KEY]
    return found
