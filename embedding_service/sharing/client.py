"""RemoteEngine: a web worker's connections to the model processes."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, cast

import msgspec

from embedding_service.engine import GRACE_SECONDS, AnswerT, AnyRequest, Outcome, Request, Status
from embedding_service.errors import DeadlineExceeded, ModelFailure, Overloaded, ServiceError, Unavailable
from embedding_service.sharing import wire
from embedding_service.sharing.supervisor_handle import SupervisorHandle

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.05
RETRY_AFTER_SECONDS = 1.0

# How often a new worker looks whether it may begin.
SETTLE_STEP_SECONDS = 0.005

# How often overdue requests are looked for.
EXPIRY_SECONDS = 0.1


class Waiter(msgspec.Struct, eq=False):
    """A thread that waits for one outcome: for a bare lock, since an Event costs three times as much."""

    due: float
    answered: Any
    size: int
    outcome: Outcome | None = None


class ModelConnection:
    """The connection to one model process, restored for as long as this worker lives.

    Three threads, which are greenlets in a web worker: one connects and reads; one sends, together, the
    calls of all requests that arrived together; one fails requests whose answer is overdue, so that
    no request needs a timer of its own.
    """

    def __init__(self, path: str, on_refused: Callable[[], None]) -> None:
        self._path = path
        self._on_refused = on_refused
        self._channel: wire.Channel | None = None
        self._waiters: dict[int, Waiter] = {}
        self._unsent: dict[int, AnyRequest] = {}
        # Released if there are calls to send; `_is_sending` says that the sender will look again.
        self._calls = threading.Lock()
        self._calls.acquire()
        self._is_sending = False
        # Held by the thread that sends.
        self._sending = threading.Lock()
        self._numbers = count()
        self._counting = threading.Lock()
        # The characters of the requests that are not yet answered.
        self.load = 0
        self._was_healthy = False
        # Whether the model process has reported its state, or is known not to listen.
        self.known = False
        self.status = Status(state="loading", reason="the model process is starting")
        for target in (self._live, self._send_forever, self._expire_forever):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def call(self, request: Request[AnswerT]) -> AnswerT:
        """Send the request and wait for its answer."""
        size = sum(map(len, request.texts)) + len(request.texts)
        waiter = Waiter(request.deadline + GRACE_SECONDS, threading.Lock(), size)
        waiter.answered.acquire()
        number = next(self._numbers)
        self._waiters[number] = waiter
        with self._counting:
            self.load += size
        channel = self._channel
        if channel is None:
            # Checked only now: if the connection is lost in between, `_disconnect` has seen this waiter.
            self._finish(number, self._lost())
            raise self._lost()
        if len(self._waiters) == 1 and self._sending.acquire(blocking=False):
            # Nothing can go with it, so it does not wait for the sender's turn.
            try:
                self._send(channel, [(number, cast(AnyRequest, request))])
            finally:
                self._sending.release()
        else:
            self._unsent[number] = cast(AnyRequest, request)
            if not self._is_sending:
                self._is_sending = True
                self._wake_sender()
        waiter.answered.acquire()
        outcome = waiter.outcome
        if isinstance(outcome, ServiceError):
            raise outcome
        return cast(AnswerT, outcome)

    def _wake_sender(self) -> None:
        # Two threads may both have seen that nobody sends; greenlets cannot.
        with contextlib.suppress(RuntimeError):
            self._calls.release()

    def _send_forever(self) -> None:
        while True:
            self._calls.acquire()
            self._is_sending = False
            # Another thread may fail a request meanwhile, which is then gone.
            waiting = [(number, self._unsent.pop(number, None)) for number in list(self._unsent)]
            calls = [(number, request) for number, request in waiting if request is not None]
            channel = self._channel
            if channel is not None and calls:
                with self._sending:
                    self._send(channel, calls)

    def _send(self, channel: wire.Channel, calls: list[tuple[int, AnyRequest]]) -> None:
        """Send calls in one message. Only those that cannot be encoded fail."""
        try:
            with contextlib.suppress(wire.Closed):
                channel.send(wire.Calls([number for number, _ in calls], [request for _, request in calls]))
        except Exception:
            # Nothing has been sent of any.
            if len(calls) > 1:
                for call in calls:
                    self._send(channel, [call])
                return
            log.exception("A request could not be sent to the model process")
            self._finish(calls[0][0], ModelFailure("the service failed on this request"))

    def _expire_forever(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(EXPIRY_SECONDS)
            now = time.monotonic()
            for number in [number for number, waiter in list(self._waiters.items()) if waiter.due < now]:
                self._unsent.pop(number, None)
                self._finish(number, DeadlineExceeded("the model did not answer before the deadline"))

    def _finish(self, number: int, outcome: Outcome) -> None:
        waiter = self._waiters.pop(number, None)
        if waiter is not None:
            with self._counting:
                self.load -= waiter.size
            waiter.outcome = outcome
            waiter.answered.release()

    def _live(self) -> None:
        pause = threading.Event()
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
                self.known = True
                self._on_refused()
                pause.wait(RECONNECT_SECONDS)
                continue
            self._channel = channel = wire.Channel(sock)
            try:
                while True:
                    self._receive(channel.receive())
            except wire.Closed:
                pass
            except Exception:
                log.exception("A message of the model process could not be read")
            self._disconnect()
            channel.close()

    def _receive(self, message: wire.Message) -> None:
        match message:
            case wire.Replies():
                for number, answer in zip(message.numbers, message.answers, strict=True):
                    self._finish(number, answer)
            case wire.ErrorReply():
                self._finish(message.number, message.error())
            case wire.StatusNotice():
                self.status = message.status
                self._was_healthy |= message.status.state == "healthy"
                self.known = True

    def _disconnect(self) -> None:
        state, reason = ("loading", "the model process is starting")
        if self._was_healthy:
            state, reason = "unhealthy", "the model process was lost and is being started again"
        # Before the channel: a call that finds none must not find the state healthy.
        self.status = Status(state=state, reason=reason, info=self.status.info)  # type: ignore[arg-type]
        self._channel = None
        numbers = list(self._waiters)
        if self._was_healthy:
            log.error("The model process was lost with %d requests in flight", len(numbers))
        for number in numbers:
            self._unsent.pop(number, None)
            self._finish(number, self._lost())

    def _lost(self) -> Unavailable:
        return Unavailable(self.status.reason, retry_after_seconds=RETRY_AFTER_SECONDS)


class RemoteEngine:
    """Embeds in the model processes that the supervisor keeps; requests go to the least loaded.

    What one refuses because too much waits there, another may take. If a process is lost, what it had not
    answered goes to another one, once: a request that ends every process that it reaches must not reach all.

    Survives a fork (gunicorn --preload): each process makes its own connections, when it first needs them.
    """

    def __init__(self, supervisor: SupervisorHandle, devices: Sequence[str]) -> None:
        self._supervisor = supervisor
        self._devices = devices
        self._socket_paths = [str(supervisor.folder.socket(index)) for index in range(len(devices))]
        self._gone = False
        self._connecting = threading.Lock()
        self._connections: list[ModelConnection] = []
        self._connect()
        os.register_at_fork(after_in_child=self._leave)

    def call(self, request: Request[AnswerT]) -> AnswerT:
        connection = self._least_loaded(self._ready())
        try:
            return connection.call(request)
        except Unavailable:
            if connection.status.state == "healthy":
                raise
        except Overloaded:
            others = [other for other in self._ready() if other is not connection]
            if not others:
                raise
            return self._least_loaded(others).call(request)
        return self._least_loaded(self._ready()).call(request)

    def _ready(self) -> list[ModelConnection]:
        connections = self._connections or self._connect()
        return [connection for connection in connections if connection.status.state == "healthy"]

    def _least_loaded(self, ready: list[ModelConnection]) -> ModelConnection:
        if not ready:
            raise Unavailable(self.status().reason, retry_after_seconds=RETRY_AFTER_SECONDS)
        if len(ready) == 1:
            return ready[0]
        first = next(self._turns) % len(ready)
        return min(ready[first:] + ready[:first], key=lambda connection: connection.load)

    def status(self) -> Status:
        if self._gone:
            return Status(state="unhealthy", reason="the supervisor of the model process is gone")
        statuses = [connection.status for connection in self._connections or self._connect()]
        if len(statuses) == 1:
            return statuses[0]
        order = ("healthy", "unhealthy", "loading", "draining")
        best = min(statuses, key=lambda status: order.index(status.state))
        devices = [
            (status.info.device if status.info else device, status.state)
            for device, status in zip(self._devices, statuses, strict=True)
        ]
        return msgspec.structs.replace(best, devices=devices)

    def must_restart(self) -> bool:
        return self._gone

    def settle(self, seconds: float) -> None:
        """Wait until a model process is ready or all are known: a new worker should not begin with 503s."""
        end = time.monotonic() + seconds
        connections = self._connections or self._connect()
        while time.monotonic() < end and not all(connection.known for connection in connections):
            if any(connection.status.state == "healthy" for connection in connections):
                return
            time.sleep(SETTLE_STEP_SECONDS)

    def close(self) -> None:
        """Nothing to do: the connections end with the process."""

    def _connect(self) -> list[ModelConnection]:
        with self._connecting:
            if not self._connections:
                # Which of equally loaded ones is next: other workers, which also choose, begin with others.
                self._turns = count(os.getpid())
                self._connections = [ModelConnection(path, self._refused) for path in self._socket_paths]
        return self._connections

    def _leave(self) -> None:
        """In a forked child, to which the parent's connections and threads mean nothing."""
        self._connecting = threading.Lock()
        self._connections = []

    def _refused(self) -> None:
        """No model process listens. The supervisor handles that, unless it is dead itself."""
        if not self._gone and self._supervisor.gone():
            self._gone = True
            log.critical("The supervisor of the model process is gone; this service must be restarted")
            self._supervisor.stop_master()
