"""A web worker's connection to a model process, with a socket that the test scripts."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding_service.engine import Embeddings, EmbedRequest, Status, Timings
from embedding_service.errors import DeadlineExceeded, ModelFailure, Unavailable
from embedding_service.sharing import wire
from embedding_service.sharing.client import ModelConnection, RemoteEngine
from embedding_service.sharing.runtime_folder import RuntimeFolder
from embedding_service.sharing.supervisor_handle import SupervisorHandle
from tests.service import wait_until


class ModelProcess:
    """Accepts one connection; `answer` sends a vector for each call received so far."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.numbers: list[int] = []
        self.is_connected = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        self._sock, _ = self._listener.accept()
        self.channel = wire.Channel(self._sock)
        self.is_connected = True
        try:
            while True:
                message = self.channel.receive()
                assert isinstance(message, wire.Calls)
                self.numbers += message.numbers
        except wire.Closed:
            pass

    def answer(self) -> None:
        vector = np.ones((1, 3), np.float32)
        result = Embeddings(vectors=vector, tokens=1, truncated=[], timings=Timings())
        for number in self.numbers:
            self.channel.send(wire.Replies([number], [result]))

    def close(self) -> None:
        self._listener.close()
        self.channel.close()
        self._thread.join(60)


@pytest.fixture
def process(tmp_path) -> Iterator[ModelProcess]:
    process = ModelProcess(tmp_path / "socket")
    yield process
    process.close()


@pytest.fixture
def connection(process, tmp_path) -> ModelConnection:
    connection = ModelConnection(str(tmp_path / "socket"), lambda: None)
    wait_until(lambda: connection._channel is not None)
    return connection


class Asked:
    """A request in its own thread, and its outcome."""

    def __init__(self, connection: ModelConnection, text: str, seconds: float = 60.0) -> None:
        self.outcome: Embeddings | Exception | None = None
        request = EmbedRequest(texts=[text], deadline=time.monotonic() + seconds)
        self._thread = threading.Thread(target=self._ask, args=(connection, request))
        self._thread.start()

    def _ask(self, connection: ModelConnection, request: EmbedRequest) -> None:
        try:
            self.outcome = connection.call(request)
        except Exception as error:
            self.outcome = error

    def wait(self) -> Embeddings | Exception | None:
        self._thread.join(60)
        return self.outcome


def test_every_request_gets_its_answer(connection, process):
    asked = [Asked(connection, f"text {number}") for number in range(50)]
    wait_until(lambda: len(process.numbers) == 50)
    process.answer()
    assert all(isinstance(one.wait(), Embeddings) for one in asked)
    assert connection.load == 0


def test_a_request_that_cannot_be_encoded_fails_alone(connection, process):
    bad = Asked(connection, "lone \ud800 surrogate")
    assert isinstance(bad.wait(), ModelFailure)
    good = Asked(connection, "good")
    wait_until(lambda: process.numbers)
    process.answer()
    assert isinstance(good.wait(), Embeddings)


def test_requests_in_flight_fail_with_the_connection(connection, process):
    asked = Asked(connection, "text")
    wait_until(lambda: process.numbers)
    process.channel.close()
    assert isinstance(asked.wait(), Unavailable)


def test_an_overdue_request_fails_and_is_forgotten(connection, process):
    asked = Asked(connection, "text", seconds=0.1)
    assert isinstance(asked.wait(), DeadlineExceeded)
    assert connection.load == 0


@pytest.fixture
def folder(tmp_path) -> RuntimeFolder:
    return RuntimeFolder(tmp_path)


@pytest.fixture
def slow(folder) -> Iterator[ModelProcess]:
    """A model process that accepts a worker, but has not reported its state yet."""
    process = ModelProcess(folder.socket(0))
    yield process
    process.close()


def settling(engine: RemoteEngine) -> threading.Thread:
    thread = threading.Thread(target=engine.settle, args=[120.0])
    thread.start()
    return thread


def test_a_new_worker_waits_for_the_first_report_of_a_slow_model_process(folder, slow):
    engine = RemoteEngine(SupervisorHandle(folder), 1)
    thread = settling(engine)
    wait_until(lambda: slow.is_connected)
    assert engine.status().state == "loading"
    assert thread.is_alive()
    slow.channel.send(wire.StatusNotice(Status(state="healthy")))
    thread.join(60)
    assert not thread.is_alive()
    assert engine.status().state == "healthy"


def test_a_new_worker_waits_for_no_second_model_process(folder, slow):
    hung = socket.socket(socket.AF_UNIX)
    with hung:
        hung.bind(str(folder.socket(1)))
        hung.listen(1)
        thread = settling(RemoteEngine(SupervisorHandle(folder), 2))
        wait_until(lambda: slow.is_connected)
        slow.channel.send(wire.StatusNotice(Status(state="healthy")))
        thread.join(60)
        assert not thread.is_alive()


def test_a_new_worker_does_not_wait_for_a_model_process_that_does_not_listen(folder):
    thread = settling(RemoteEngine(SupervisorHandle(folder), 1))
    thread.join(60)
    assert not thread.is_alive()
