"""Services whose texts can inject faults into the model process, with a folder per module."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Service

DEADLINE = 4.0
INJECTION = str(Path(__file__).parent / "injection")


class FaultyService(Service):
    """A service with tests/faults/injection in its model process; `seen()` are the texts that reached it."""

    def __init__(self, folder: Path, command: list[str] | None = None, **settings: str) -> None:
        self._seen = folder / "seen"
        super().__init__(
            folder, command, PYTHONPATH=INJECTION, FAULTS_SEEN=str(self._seen), BACKEND="torch", **settings
        )

    def seen(self) -> str:
        return self._seen.read_text(encoding="utf-8") if self._seen.exists() else ""


@pytest.fixture(scope="module")
def faulty(own_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyService]:
    """One such service per module. A test that kills its model process must leave it ready again."""
    running = FaultyService(tmp_path_factory.mktemp("faulty"))
    try:
        yield running.wait_ready()
    finally:
        end(running)


@pytest.fixture(scope="module")
def impatient(own_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyService]:
    """The same with a short deadline."""
    running = FaultyService(tmp_path_factory.mktemp("impatient"), REQUEST_TIMEOUT_SECONDS=str(DEADLINE))
    try:
        yield running.wait_ready()
    finally:
        end(running)


def end(service: Service) -> None:
    """Stop a service that a test may have damaged, whatever its exit code."""
    if service.process.poll() is None:
        try:
            service.stop(signal.SIGTERM)
        finally:
            if service.process.poll() is None:
                os.killpg(service.process.pid, signal.SIGKILL)
