"""Fixtures for all tests: the real service, started once a run, and the oracle for its vectors.

The tests are in two rings. `make test` runs those that need no process of their own, and those marked
`promise`; `make test-all` runs the others as well. A test that uses `own_process`, directly or through
`start` or another fixture, is marked `process` here; one that starts processes by itself has the mark in
its file.
"""

import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.service import RUN_FOLDER, Service, SharedService  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Make a folder for all workers, and a process that ends what they leave, even if this one is killed."""
    if not hasattr(config, "workerinput"):
        folder = os.environ[RUN_FOLDER] = tempfile.mkdtemp(prefix="embedding-service-tests-")
        command = [sys.executable, "-m", "tests.guard", folder]
        guard = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
        config.add_cleanup(guard.communicate)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "own_process" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.process)
        if any(map(item.get_closest_marker, ("long", "deploy", "nightly"))):
            item.add_marker(pytest.mark.timeout(3600))
    # Those that build for long begin first; those that others wait for come last.
    items.sort(key=lambda item: (bool(item.get_closest_marker("alone")), "/deploy/" not in item.nodeid))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test marked `alone` waits for those that other workers run, and these workers wait for it."""
    folder = Path(os.environ[RUN_FOLDER])
    with (folder / "turn").open("w") as turn, (folder / "running").open("w") as running:
        # A process that waits holds the turn, so that the others cannot pass it.
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The folder of the default model: the packaged one, or TEST_MODEL if that package is not installed."""
    from embedding_service.inference import source

    return source.resolve(os.environ.get("TEST_MODEL", source.DEFAULT_MODEL), None).folder


@pytest.fixture(scope="session")
def oracle(model_folder: Path):
    """SentenceTransformer itself, on the CPU in float32, whose vectors are the expected ones."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model_folder), device="cpu")


@pytest.fixture(scope="session")
def service() -> Service:
    """`python app.py` with one web worker, ready; it serves the whole run, so tests leave it as it is."""
    return SharedService("service")


@pytest.fixture(scope="session")
def own_process() -> None:
    """Requested by every fixture that starts processes; its tests get the mark `process`."""


@pytest.fixture
def start(own_process: None, tmp_path: Path) -> Iterator:
    """Start services that are stopped after the test: `start(BATCH_SIZE="8")`, `start(command=[...])`."""
    running: list[Service] = []

    def begin(command: list[str] | None = None, cwd: Path = ROOT, **settings: str) -> Service:
        running.append(Service(tmp_path, command, cwd, **settings))
        return running[-1]

    yield begin
    for service in running:
        if service.process.poll() is None:
            # At once, since idle connections would keep it for two seconds; SIGTERM if it starts only now.
            service.process.send_signal(signal.SIGQUIT)
            service.stop()


WITHOUT_MODEL = str(ROOT / "tests" / "without_model")


@pytest.fixture
def start_without_model(start):
    """`start` for tests of processes, logs, headers and flags: no model is loaded, so it is ready at once."""
    return functools.partial(start, PYTHONPATH=WITHOUT_MODEL)


def require_program(name: str, package: str) -> str:
    """The path of a system program. If it is missing, the test is skipped with a hint, or fails in CI."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed (Debian: apt-get install {package})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def require_browser() -> str:
    """The path of Chromium, or of Google Chrome if only that is installed."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    return path or require_program("chromium", "chromium")
