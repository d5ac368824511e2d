"""A web worker's connection to a model process, with a socket that the test scripts."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding_service.engine import Embeddings, EmbedRequest, Status, Timings
from embedding_service.errors import DeadlineExceeded, ModelFailure, Overloaded, Unavailable
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

    def __init__(self, connection: ModelConnection | RemoteEngine, text: str, seconds: float = 60.0) -> None:
        self.outcome: Embeddings | Exception | None = None
        request = EmbedRequest(texts=[text], deadline=time.monotonic() + seconds)
        self._thread = threading.Thread(target=self._ask, args=(connection, request))
        self._thread.start()

    def _ask(self, connection: ModelConnection | RemoteEngine, request: EmbedRequest) -> None:
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
    engine = RemoteEngine(SupervisorHandle(folder), ["cpu"])
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
        thread = settling(RemoteEngine(SupervisorHandle(folder), ["cpu", "cpu"]))
        wait_until(lambda: slow.is_connected)
        slow.channel.send(wire.StatusNotice(Status(state="healthy")))
        thread.join(60)
        assert not thread.is_alive()


def test_a_new_worker_does_not_wait_for_a_model_process_that_does_not_listen(folder):
    thread = settling(RemoteEngine(SupervisorHandle(folder), ["cpu"]))
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def several(folder) -> Iterator[tuple[RemoteEngine, list[ModelProcess]]]:
    """An engine with three model processes, all ready."""
    processes = [ModelProcess(folder.socket(place)) for place in range(3)]
    engine = RemoteEngine(SupervisorHandle(folder), [f"cuda:{place}" for place in range(3)])
    for process in processes:
        wait_until(lambda process=process: process.is_connected)
        process.channel.send(wire.StatusNotice(Status(state="healthy")))
    wait_until(lambda: [state for _, state in engine.status().devices] == ["healthy"] * 3)
    yield engine, processes
    for process in processes:
        process.close()


def test_requests_go_where_the_fewest_characters_wait(several):
    engine, processes = several
    large = Asked(engine, "many characters " * 100)
    wait_until(lambda: sum(len(process.numbers) for process in processes) == 1)
    small = []
    for sent in range(2, 12):
        small.append(Asked(engine, "few"))
        wait_until(lambda sent=sent: sum(len(process.numbers) for process in processes) == sent)
    assert sorted(len(process.numbers) for process in processes) == [1, 5, 5]
    for process in processes:
        process.answer()
    assert all(isinstance(one.wait(), Embeddings) for one in [large, *small])


def test_one_at_a_time_they_go_to_each_in_turn(several):
    engine, processes = several
    for turn in range(1, 10):
        asked = Asked(engine, "text")
        wait_until(lambda turn=turn: sum(len(process.numbers) for process in processes) == turn)
        for process in processes:
            process.answer()
        assert isinstance(asked.wait(), Embeddings)
    assert [len(process.numbers) for process in processes] == [3, 3, 3]


def test_what_one_refuses_because_too_much_waits_there_another_takes(several):
    engine, processes = several
    asked = Asked(engine, "text")
    wait_until(lambda: any(process.numbers for process in processes))
    (first,) = [process for process in processes if process.numbers]
    for message in wire.replies([(first.numbers[0], Overloaded("the queue is full"))]):
        first.channel.send(message)
    others = [process for process in processes if process is not first]
    wait_until(lambda: any(process.numbers for process in others))
    for process in others:
        process.answer()
    assert isinstance(asked.wait(), Embeddings)


def test_what_a_lost_device_has_not_answered_goes_to_another_and_its_state_is_known(several):
    engine, processes = several
    asked = []
    for sent in range(1, 10):
        asked.append(Asked(engine, f"text {sent}"))
        wait_until(lambda sent=sent: sum(len(process.numbers) for process in processes) == sent)
    assert [len(process.numbers) for process in processes] == [3, 3, 3]
    lost = processes[1]
    lost.channel.send(wire.StatusNotice(Status(state="unhealthy", reason="the device is lost")))
    for message in wire.replies(
        [(number, Unavailable("lost", retry_after_seconds=1)) for number in lost.numbers]
    ):
        lost.channel.send(message)
    wait_until(lambda: sum(len(process.numbers) for process in (processes[0], processes[2])) == 9)
    assert engine.status().state == "healthy"
    assert engine.status().devices == [("cuda:0", "healthy"), ("cuda:1", "unhealthy"), ("cuda:2", "healthy")]
    for process in (processes[0], processes[2]):
        process.answer()
    assert all(isinstance(one.wait(), Embeddings) for one in asked)
    lost.channel.send(wire.StatusNotice(Status(state="healthy")))
    wait_until(lambda: engine.status().devices[1] == ("cuda:1", "healthy"))
