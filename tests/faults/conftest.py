"""Services whose texts can inject faults into the model process, with a folder per module."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from tests.conftest import WITHOUT_MODEL
from tests.service import Service

DEADLINE = 4.0
S = TypeVar("S", bound=Service)
INJECTION = str(Path(__file__).parent / "injection")


class FaultyService(Service):
    """A service with tests/faults/injection in its model process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, PYTHONPATH=INJECTION, BACKEND="torch")


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


class Impatient(Service):
    """A service with a short deadline; its model waits while `held` exists, and hangs on certain words."""

    def __init__(self, folder: Path) -> None:
        self.held = folder / "held"
        super().__init__(
            folder, PYTHONPATH=WITHOUT_MODEL, HELD=str(self.held), REQUEST_TIMEOUT_SECONDS=str(DEADLINE)
        )

    def seen(self) -> str:
        """The texts that reached the model."""
        seen = self.held.with_suffix(".seen")
        return seen.read_text(encoding="utf-8") if seen.exists() else ""


@pytest.fixture(scope="module")
def impatient(own_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Impatient]:
    """One such service per module."""
    with kept_until_end(Impatient(tmp_path_factory.mktemp("impatient"))) as running:
        yield running
