"""The model process: a LocalEngine behind a private unix socket."""

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from embedding_service.engine import AnyRequest, Outcome, Status
from embedding_service.errors import StartupError
from embedding_service.inference.local import LocalEngine
from embedding_service.observability import collector, logs, metrics
from embedding_service.settings.config import Config
from embedding_service.sharing import wire
from embedding_service.sharing.runtime_folder import RuntimeFolder
from embedding_service.sharing.settings import EX_CONFIG, EX_SOFTWARE, LoadReport
from embedding_service.sharing.watch import Watch

# Not __name__, which is __main__ where this runs as a process.
log = logging.getLogger("embedding_service.sharing.server")

WATCH_SECONDS = 0.5
ACCEPT_AGAIN_SECONDS = 0.2

# From linux/prctl.h.
PR_SET_PDEATHSIG = 1


class Connection:
    """One web worker: a thread that reads its calls, and one that writes what could not be sent immediately.

    The thread that produces an answer sends it: waking another thread would cost more than sending.
    """

    def __init__(self, sock: socket.socket, server: "ModelServer") -> None:
        self._channel = wire.Channel(sock)
        self._server = server
        self._outbox: deque[wire.Message] = deque()
        self._sending = threading.Lock()
        # What the socket did not accept; the thread that puts it here leaves `_sending` locked.
        self._rest: queue.SimpleQueue[list[memoryview] | None] = queue.SimpleQueue()
        for target in (self._read_forever, self._write_forever):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def send(self, message: wire.Message) -> None:
        """Send a message, or leave it to the writer: a worker that does not read must not block the model."""
        self._outbox.append(message)
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(wire.Closed):
            # If another thread holds the lock, return: it re-checks the outbox after unlocking.
            while self._outbox and self._sending.acquire(blocking=False):
                rest: list[memoryview] = []
                try:
                    # Only the thread with the lock takes from the outbox, so it has at least as many.
                    messages = [self._outbox.popleft() for _ in range(len(self._outbox))]
                    rest = self._channel.send(*messages, wait=False)
                finally:
                    if rest:
                        self._rest.put(rest)
                    else:
                        self._sending.release()

    def _read_forever(self) -> None:
        engine = self._server.engine
        try:
            while True:
                calls: list[tuple[int, AnyRequest]] = []
                for message in self._channel.receive_all():
                    if isinstance(message, wire.Calls):
                        calls += zip(message.numbers, message.requests, strict=True)
                engine.submit(calls, self._answer, may_run=True)
        except wire.Closed:
            pass
        except Exception:
            log.exception("A message of a web worker could not be read")
        finally:
            self._server.forget(self)
            self._rest.put(None)
            engine.cancel(self._answer)
            self._channel.close()

    def _write_forever(self) -> None:
        with contextlib.suppress(wire.Closed):
            while (rest := self._rest.get()) is not None:
                self._channel.send_rest(rest)
                self._sending.release()
                self._flush()

    def _answer(self, outcomes: Sequence[tuple[int, Outcome]]) -> None:
        """Send outcomes that came together, in one system call."""
        self._outbox += wire.replies(outcomes)
        self._flush()


class ModelServer:
    """Accepts web workers immediately, and sends each the engine's status."""

    def __init__(self, path: Path, settings: Config) -> None:
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(128)
        self.engine = LocalEngine(settings, on_status=self._broadcast)
        threading.Thread(target=self._accept_forever, name="accept", daemon=True).start()

    def forget(self, connection: Connection) -> None:
        """The worker has disconnected."""
        with self._lock:
            self._connections.discard(connection)

    def _accept_forever(self) -> None:
        pause = threading.Event()
        while True:
            try:
                self._accept()
            except Exception as error:
                # Too many open files or threads: meanwhile the worker waits in the listener's queue.
                log.error("A web worker could not be accepted, trying again: %s", error)
                pause.wait(ACCEPT_AGAIN_SECONDS)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        try:
            with self._lock:
                connection = Connection(sock, self)
                self._connections.add(connection)
                connection.send(wire.StatusNotice(self.engine.status()))
        except BaseException:
            sock.close()
            raise

    def _broadcast(self, status: Status) -> None:
        with self._lock:
            for connection in self._connections:
                connection.send(wire.StatusNotice(status))


def _exit_with_parent() -> None:
    """End with the supervisor, which holds the other end of standard input while it lives."""
    # A reset instead of the end means that the supervisor had not read this process's report.
    with contextlib.suppress(ConnectionResetError):
        while os.read(0, 4096):
            pass
    logs.writer.flush()
    os._exit(0)


def _be_killed_with_parent() -> None:
    """End with the supervisor even if a hung call keeps the thread above from running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(engine: LocalEngine, heartbeat: Path, hang_seconds: float) -> int:
    """Send heartbeats; returns the exit code once this process can no longer serve."""
    try:
        # First of all, so that a process that is killed now has reported its device.
        os.write(0, msgspec.json.encode(LoadReport(device=engine.wait_loaded().device)))
    except StartupError as error:
        reason = str(error).encode(errors="replace").decode()
        os.write(0, msgspec.json.encode(LoadReport(failure=reason)))
        return EX_CONFIG
    collector.freeze()
    idle = threading.Event()
    batch = Watch(hang_seconds)
    heartbeat.touch()
    while not (idle.wait(WATCH_SECONDS) or engine.must_restart()):
        os.utime(heartbeat)
        engine.rest()
        if batch.is_overdue(engine.running_since):
            log.critical(
                "A batch has been running for over %.0f s; restarting the model process", hang_seconds
            )
            break
    return EX_SOFTWARE


def main(folder: RuntimeFolder, index: int, settings: Config) -> int:
    """Serve until the supervisor goes or the engine is lost; returns the exit code."""
    logs.setup(settings)
    # Ctrl-C and a service manager signal the whole group; this process outlives the web workers
    # that drain, and ends when the supervisor closes its standard input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    metrics.share(folder.metrics)
    threading.Thread(target=_exit_with_parent, name="parent", daemon=True).start()
    _be_killed_with_parent()
    server = ModelServer(folder.socket(index), settings)
    return _watch(server.engine, folder.heartbeat(index), settings.hang_seconds)


if __name__ == "__main__":
    code = main(
        RuntimeFolder(Path(sys.argv[1])), int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=Config)
    )
    logs.writer.flush()
    # Not sys.exit: a hung batch or a lost CUDA context would keep the interpreter from ending.
    os._exit(code)
