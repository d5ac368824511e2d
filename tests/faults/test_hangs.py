"""What a web worker uses hangs: nobody else waits for it, and neither does the end of the service."""

import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.reliability import record
from tests.service import Service, wait_until

KEY, LATE = "key-of-the-first-file", "key-of-the-file-that-hangs"

# A name server that does not answer: the look-up waits until the test opens the other end of a pipe.
NAME_SERVER = """
import os, socket
look_up = socket.getaddrinfo

def waiting(host, *others, **named):
    if host != "collector.invalid":
        return look_up(host, *others, **named)
    open(os.environ["LOOKED_UP"], "w").close()
    os.close(os.open(os.environ["NAME_SERVER"], os.O_RDONLY))
    return look_up("127.0.0.1", *others, **named)

socket.getaddrinfo = waiting
"""


class Hanging(Service):
    """A service whose log is a pipe, and whose collector and name server answer only if a test lets them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sitecustomize.py").write_text(NAME_SERVER)
        (folder / "keys").write_text(f"{KEY}\n")
        for name in ("names", "log"):
            os.mkfifo(folder / name)
        self._log = os.open(folder / "log", os.O_RDWR | os.O_NONBLOCK)
        self.logged = b""
        self.collector = socket.create_server(("127.0.0.1", 0))
        self.collector.settimeout(60)
        super().__init__(
            folder,
            PYTHONPATH=str(folder),
            PYTHONFAULTHANDLER="1",
            LOOKED_UP=str(folder / "looked up"),
            NAME_SERVER=str(folder / "names"),
            LOG_FILE=str(folder / "log"),
            ACCESS_LOG="true",
            API_KEYS_FILE=str(folder / "keys"),
            OTEL_EXPORTER_OTLP_ENDPOINT=f"https://collector.invalid:{self.collector.getsockname()[1]}",
            OTEL_EXPORTER_OTLP_TIMEOUT="600",
            OTEL_BSP_SCHEDULE_DELAY="10",
        )

    def read_log(self) -> bytes:
        """All that has been logged, after reading what is in the pipe."""
        try:
            while part := os.read(self._log, 65536):
                self.logged += part
        except BlockingIOError:
            pass
        return self.logged

    def fill_log(self) -> None:
        """From now on, a line in the log waits until the pipe is read."""
        fcntl.fcntl(self._log, fcntl.F_SETPIPE_SZ, 4096)
        try:
            while True:
                os.write(self._log, b".")
        except BlockingIOError:
            pass

    def let_names_be_found(self) -> None:
        os.close(os.open(self.folder / "names", os.O_WRONLY))

    def is_unaffected(self) -> bool:
        """Whether the service answers; each answer here comes before anything is released."""
        answers = [requests.get(f"{self.url}/health/live", timeout=60)]
        answers += [self.post("/embed", {"texts": f"text {n}"}, headers={"X-API-Key": KEY}) for n in range(5)]
        return [answer.status_code for answer in answers] == [200] * 6


@pytest.fixture(scope="module")
def hanging(own_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hanging]:
    """The tests below run in order, and the last ends the service."""
    running = Hanging(tmp_path_factory.mktemp("hanging"))
    try:
        yield running.wait_ready()
    finally:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
        running.collector.close()


def test_a_name_server_that_does_not_answer(hanging):
    wait_until((hanging.folder / "looked up").exists, "a look-up of the collector's name")
    assert hanging.is_unaffected()


def test_a_collector_that_does_not_answer(hanging):
    hanging.let_names_be_found()
    connection, _ = hanging.collector.accept()
    with connection:
        connection.settimeout(60)
        assert connection.recv(1) == b"\x16", "the beginning of a TLS handshake"
        assert hanging.is_unaffected()
    # Its next attempt stays open until the service ends.
    (hanging.folder / "looked up").unlink()


def test_a_key_file_on_a_disk_that_hangs(hanging):
    os.mkfifo(hanging.folder / "new keys")
    (hanging.folder / "new keys").replace(hanging.folder / "keys")
    wait_until(
        lambda: hanging.is_unaffected() and b"its disk does not answer" in hanging.read_log(), "the hang"
    )
    assert hanging.is_unaffected()


def test_a_log_file_on_a_disk_that_hangs(hanging):
    hanging.read_log()
    hanging.fill_log()
    assert hanging.is_unaffected()
    assert b"POST" in hanging.logged
    lines = hanging.logged.count(b"route=/embed")
    wait_until(lambda: hanging.read_log().count(b"route=/embed") == lines + 5, "the lines that waited")


def test_sigterm_while_everything_hangs(hanging):
    hanging.fill_log()
    assert hanging.is_unaffected()
    began = time.monotonic()
    assert hanging.stop() == 0
    record(
        "a collector, a name server, a key file and a log file that hang",
        "each in turn, then SIGTERM while all of them hang",
        24,
        f"health and embeddings answered meanwhile; the service ended after {time.monotonic() - began:.1f} s",
    )
