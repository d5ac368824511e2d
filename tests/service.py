"""Starts the real service as a user would, on a free port, and waits for it."""

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import psutil
import requests

ROOT = Path(__file__).parent.parent
START_SECONDS = 180.0

# The variable that names the folder which all workers of a test run share.
RUN_FOLDER = "TEST_RUN_FOLDER"


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_until(condition, what: str = "the condition", seconds: float = 120.0) -> Any:
    """Call the condition until its result is truthy, and return that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")


class Service:
    """A running service, with its log in `log()` and its processes in `processes()`.

    `command` defaults to `python app.py`; "{port}" in it is replaced. Settings are passed in
    capitals, as `Service(tmp_path, BATCH_SIZE="8")`; a developer's own environment does not leak in.
    `cwd` is the working folder, by default the project's.
    """

    def __init__(
        self, folder: Path, command: list[str] | None = None, cwd: Path = ROOT, **settings: str
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_path = folder / f"service-{self.port}.log"
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "CI")
            # `make coverage` measures the processes that inherit its variable.
            or name.startswith(("HF_", "COVERAGE_"))
        }
        if RUN_FOLDER in os.environ:
            environment[RUN_FOLDER] = os.environ[RUN_FOLDER]  # by which tests/guard.py finds it
            environment["CACHE_FOLDER"] = str(Path(os.environ[RUN_FOLDER], "cache"))
        environment |= {"HOST": "127.0.0.1", "PORT": str(self.port)} | settings
        command = command or [sys.executable, "app.py"]
        self.started = time.monotonic()
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [part.format(port=self.port) for part in command],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        """All that the service has printed so far."""
        return self._log_path.read_text(errors="replace")

    def health(self) -> tuple[int, dict[str, Any]] | None:
        """Status and body of GET /health, or None if there is no response."""
        try:
            response = requests.get(f"{self.url}/health", timeout=60)
        except requests.RequestException:
            return None
        return response.status_code, response.json()

    def is_healthy(self) -> bool:
        """Whether the worker that gets this request is healthy."""
        health = self.health()
        return health is not None and health[0] == 200

    def wait_ready(self, seconds: float = START_SECONDS) -> Self:
        """Wait until every web worker is healthy; fails with the log if the service ends or takes too long.

        Each notices by itself that the model has come or gone, so one says nothing of the others.
        """

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}:\n{self.log()}")
            with contextlib.suppress(OSError, http.client.HTTPException, psutil.Error):
                workers = self.web_workers()
                return self.is_healthy() and (len(workers) < 2 or self._all_healthy(workers))
            return False

        try:
            wait_until(ready, "a healthy service", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None
        return self

    def _all_healthy(self, workers: list[psutil.Process]) -> bool:
        """Whether connections that are made at the same time reach every worker, and find it healthy."""
        with contextlib.ExitStack() as stack:
            clients = [http.client.HTTPConnection("127.0.0.1", self.port, timeout=60) for _ in range(8)]
            for client in clients:
                stack.callback(client.close)
                client.connect()
            healthy = set()
            for client in clients:
                port = client.sock.getsockname()[1]
                client.request("GET", "/health")
                if client.getresponse().status == 200:
                    healthy.add(port)
            return all(
                any(each.raddr and each.raddr.port in healthy for each in worker.net_connections("tcp"))
                for worker in workers
            )

    def post(self, path: str, json: Any, **arguments: Any) -> requests.Response:
        """POST to the service."""
        return requests.post(self.url + path, json=json, timeout=120, **arguments)

    def processes(self) -> list[psutil.Process]:
        """The service's process and everything below it."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def model_process(self) -> psutil.Process:
        """The process that holds the model."""
        return self._running("embedding_service.sharing.server")

    def supervisor(self) -> psutil.Process:
        """The process that keeps the model process running."""
        return self._running("embedding_service.sharing.supervisor")

    def web_workers(self) -> list[psutil.Process]:
        """The gunicorn workers."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "embedding_service.sharing" not in " ".join(command_of(child))]

    def _running(self, module: str) -> psutil.Process:
        for process in self.processes():
            if module in command_of(process):
                return process
        raise AssertionError(f"no process runs {module}:\n{self.log()}")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 120.0) -> int:
        """Signal the service and wait for its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


class Master(psutil.Process):  # type: ignore[misc]
    """A gunicorn master that another process may have started; it has what `Service` needs of a Popen."""

    def poll(self) -> int | None:
        """None while it runs; its exit code is not known afterwards."""
        return None if self.is_running() and self.status() != psutil.STATUS_ZOMBIE else -1


class SharedService(Service):
    """A service that serves all workers of a test run; whichever needs it first starts it."""

    def __init__(self, name: str, **settings: str) -> None:
        folder = Path(os.environ[RUN_FOLDER], name)
        folder.mkdir(exist_ok=True)
        address = folder / "address.json"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not address.exists():
                started = Service(folder, **settings).wait_ready()
                _kept.append(started)
                address.write_text(json.dumps({"port": started.port, "pid": started.process.pid}))
        facts = json.loads(address.read_text())
        self.port = facts["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_path = folder / f"service-{self.port}.log"
        self.process = Master(facts["pid"])


# Python warns about a Popen that is collected while its process runs.
_kept: list[Service] = []


def command_of(process: psutil.Process) -> list[str]:
    """The command line of a process, or a name that is not ours if it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return ["embedding_service.sharing.gone"]
