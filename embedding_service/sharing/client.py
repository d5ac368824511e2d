"""RemoteEngine: what a web worker holds of the model processes."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from embedding_service.engine import (
    GRACE_SECONDS,
    Embeddings,
    EmbedRequest,
    Status,
    TokenizedText,
    TokenizeRequest,
)
from embedding_service.errors import DeadlineExceeded, ServiceError, Unavailable
from embedding_service.sharing import wire
from embedding_service.sharing.supervisor_handle import SupervisorHandle

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.05
RETRY_AFTER_SECONDS = 1.0

Outcome = Embeddings | list[TokenizedText] | ServiceError


class Waiter:
    """A thread that waits for one outcome. A bare lock: an Event costs three times as much."""

    __slots__ = ("_lock", "outcome")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.outcome: Outcome | None = None

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._lock.release()

    def wait(self, seconds: float) -> Outcome | None:
        return self.outcome if self._lock.acquire(timeout=max(0.0, seconds)) else None


class Link:
    """The connection to one model process, made again for as long as this worker lives."""

    def __init__(self, path: str, on_refused: Callable[[], None]) -> None:
        self._path = path
        self._on_refused = on_refused
        self._lock = threading.Lock()
        self._channel: wire.Channel | None = None
        self._waiters: dict[int, Waiter] = {}
        self._numbers = count()
        self._was_healthy = False
        self._known = threading.Event()
        self.status = Status(state="loading", reason="the model process is starting")
        threading.Thread(target=self._live, name="link", daemon=True).start()

    @property
    def load(self) -> int:
        """Requests sent and not yet answered."""
        return len(self._waiters)

    def embed(self, request: EmbedRequest) -> Embeddings:
        """Send the request and wait for its outcome."""
        outcome = self._ask(wire.Call, request)
        assert isinstance(outcome, Embeddings)
        return outcome

    def tokenize(self, request: TokenizeRequest) -> list[TokenizedText]:
        """Send the request and wait for its outcome."""
        outcome = self._ask(wire.Tokenize, request)
        assert isinstance(outcome, list)
        return outcome

    def _ask(self, kind: Any, request: EmbedRequest | TokenizeRequest) -> Embeddings | list[TokenizedText]:
        waiter = Waiter()
        with self._lock:
            channel = self._channel
            if channel is None:
                raise self._lost()
            number = next(self._numbers)
            self._waiters[number] = waiter
        try:
            channel.send(kind(number, request), until=request.deadline)
            outcome = waiter.wait(request.deadline - time.monotonic() + GRACE_SECONDS)
        except wire.Closed:
            raise self._lost() from None
        except TimeoutError:
            outcome = None
        finally:
            self._waiters.pop(number, None)
        if outcome is None:
            raise DeadlineExceeded("the model did not answer before the deadline")
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    def settle(self, seconds: float) -> None:
        """Wait until the model process has said how it is, or it is known that none listens."""
        self._known.wait(seconds)

    def _live(self) -> None:
        pause = threading.Event()
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
                self._known.set()
                self._on_refused()
                pause.wait(RECONNECT_SECONDS)
                continue
            channel = wire.Channel(sock)
            with self._lock:
                self._channel = channel
            try:
                while True:
                    self._receive(*channel.receive())
            except wire.Closed:
                pass
            except Exception:
                log.exception("A message of the model process could not be read")
            self._disconnect()
            channel.close()

    def _receive(self, message: wire.Message, payload: bytearray) -> None:
        match message:
            case wire.Replies():
                for number, result in message.results(payload):
                    waiter = self._waiters.pop(number, None)
                    if waiter is not None:
                        waiter.finish(result)
            case wire.Tokenized():
                waiter = self._waiters.pop(message.number, None)
                if waiter is not None:
                    waiter.finish(message.texts)
            case wire.Failure():
                waiter = self._waiters.pop(message.number, None)
                if waiter is not None:
                    waiter.finish(message.error())
            case wire.StatusNotice():
                self.status = message.status
                self._was_healthy |= message.status.state == "healthy"
                self._known.set()

    def _disconnect(self) -> None:
        with self._lock:
            self._channel = None
            waiters = list(self._waiters.values())
            self._waiters.clear()
            state, reason = ("loading", "the model process is starting")
            if self._was_healthy:
                state, reason = "unhealthy", "the model process was lost and is being started again"
                log.error("The model process was lost with %d requests in flight", len(waiters))
            self.status = Status(state=state, reason=reason, info=self.status.info)  # type: ignore[arg-type]
        for waiter in waiters:
            waiter.finish(self._lost())

    def _lost(self) -> Unavailable:
        return Unavailable(self.status.reason, retry_after_seconds=RETRY_AFTER_SECONDS)


class RemoteEngine:
    """Embeds in the model processes that the supervisor keeps; requests go to the least loaded.

    Survives a fork (gunicorn --preload): each process makes its own connections.
    """

    def __init__(
        self,
        supervisor: SupervisorHandle,
        model_processes: int,
    ) -> None:
        self._supervisor = supervisor
        self._socket_paths = [str(supervisor.folder.socket(index)) for index in range(model_processes)]
        self._gone = False
        self._connecting = threading.Lock()
        self._connect()

    def embed(self, request: EmbedRequest) -> Embeddings:
        return self._least_loaded().embed(request)

    def tokenize(self, request: TokenizeRequest) -> list[TokenizedText]:
        return self._least_loaded().tokenize(request)

    def _least_loaded(self) -> Link:
        ready = [link for link in self._alive() if link.status.state == "healthy"]
        if not ready:
            raise Unavailable(self.status().reason, retry_after_seconds=RETRY_AFTER_SECONDS)
        return min(ready, key=lambda link: link.load)

    def status(self) -> Status:
        if self._gone:
            return Status(state="unhealthy", reason="the supervisor of the model process is gone")
        statuses = [link.status for link in self._alive()]
        order = ("healthy", "unhealthy", "loading", "draining")
        return min(statuses, key=lambda status: order.index(status.state))

    def must_restart(self) -> bool:
        return self._gone

    def settle(self, seconds: float) -> None:
        """Wait for the first word of each model process, so that a new worker does not begin with a 503."""
        for link in self._alive():
            link.settle(seconds)

    def close(self) -> None:
        """Nothing to do: the connections end with the process."""

    def _alive(self) -> list[Link]:
        if self._process != os.getpid():
            with self._connecting:
                if self._process != os.getpid():
                    self._connect()
        return self._links

    def _connect(self) -> None:
        self._links = [Link(path, self._refused) for path in self._socket_paths]
        self._process = os.getpid()

    def _refused(self) -> None:
        """No model process listens; that is the supervisor's business unless it is dead itself."""
        if not self._gone and self._supervisor.gone():
            self._gone = True
            log.critical("The supervisor of the model process is gone; this service must be restarted")
            self._supervisor.stop_master()
