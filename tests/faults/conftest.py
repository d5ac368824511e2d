"""Services whose texts can inject faults into the model process, with a folder per module."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from tests.service import Service

DEADLINE = 4.0
S = TypeVar("S", bound=Service)
INJECTION = str(Path(__file__).parent / "injection")


class FaultyService(Service):
    """A service with tests/faults/injection in its model process; `seen()` are the texts that reached it."""

    def __init__(self, folder: Path, command: list[str] | None = None, **settings: str) -> None:
        self._seen = folder / "seen"
        super().__init__(
            folder, command, PYTHONPATH=INJECTION, FAULTS_SEEN=str(self._seen), BACKEND="torch", **settings
        )

    def let_go_on(self) -> None:
        """End what @@slow@@ began."""
        Path(f"{self._seen}.go-on").touch()

    def seen(self) -> str:
        return self._seen.read_text(encoding="utf-8") if self._seen.exists() else ""


@contextmanager
def kept_until_end(service: S) -> Iterator[S]:
    """The service, once it is ready; it is stopped even if a test has damaged it, whatever its exit code."""
    try:
        yield service.wait_ready()
    finally:
        if service.process.poll() is None:
            try:
                service.stop(signal.SIGTERM)
            finally:
                if service.process.poll() is None:
                    os.killpg(service.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def faulty(own_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyService]:
    """One such service per module. A test that kills its model process must leave it ready again."""
    with kept_until_end(FaultyService(tmp_path_factory.mktemp("faulty"))) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(own_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyService]:
    """The same with a short deadline."""
    folder = tmp_path_factory.mktemp("impatient")
    with kept_until_end(FaultyService(folder, REQUEST_TIMEOUT_SECONDS=str(DEADLINE))) as running:
        yield running
