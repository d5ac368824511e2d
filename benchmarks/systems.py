"""The systems under test: how to start each one, on a port of its own, and how to send it requests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).parent.parent
INFINITY = ROOT / "build" / "infinity-venv" / "bin" / "infinity_emb"
START_SECONDS = 180.0

# Variables that are removed, so that neither your settings nor a proxy affect a measurement.
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


class System:
    """A server under test. `path` and `body` are those of its API; `formats` are its encodings of vectors."""

    name = ""
    host = "127.0.0.1"
    path = "/embed"
    formats: tuple[str, ...] = ("float",)

    def __init__(self, command: list[str], folder: Path, log: Path, **settings: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        settings = {name: value.format(port=self.port) for name, value in settings.items()}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [part.format(port=self.port) for part in command],
                cwd=folder,
                env=kept | settings,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._log = log
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        """The id of the process that was started."""
        return self._process.pid

    @property
    def url(self) -> str:
        """The URL for requests."""
        return f"http://{self.host}:{self.port}{self.path}"

    def body(self, texts: list[str], encoding: str) -> bytes:
        """A request's body."""
        fields: dict[str, Any] = {"texts": texts if len(texts) > 1 else texts[0]}
        if encoding != "float":
            fields["encoding_format"] = encoding
        return json.dumps(fields).encode()

    def wait_ready(self) -> float:
        """Wait until /health returns 200; returns the seconds that this took."""
        while time.monotonic() - self.started < START_SECONDS:
            if self._process.poll() is not None:
                raise SystemExit(f"{self.name} ended:\n{self._log.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://{self.host}:{self.port}/health", timeout=5):
                    return time.monotonic() - self.started
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"{self.name} was not ready in {START_SECONDS} s:\n{self._log.read_text()[-2000:]}")

    def log(self) -> str:
        """The server's output."""
        return self._log.read_text(errors="replace")

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Its processes by what they do: here all together."""
        parent = psutil.Process(self.pid)
        return {"all": [parent, *parent.children(recursive=True)]}

    def cpu_by_role(self) -> dict[str, float]:
        """The CPU time of all threads so far, those that have ended too, of each of `processes()`."""
        times = {role: [process.cpu_times() for process in found] for role, found in self.processes().items()}
        return {role: sum(time.user + time.system for time in found) for role, found in times.items()}

    def memory_mib(self) -> float:
        """The memory of all its processes; shared pages are counted once per process."""
        parent = psutil.Process(self.pid)
        used: int = sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)])
        return used / 2**20

    def stop(self) -> None:
        """Stop the server and all that it started."""
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Service(System):
    """This service: `python app.py` with default settings, in this checkout or another."""

    name = "service"
    formats = ("float", "base64")

    def __init__(self, scratch: Path, device: str, root: Path = ROOT, **settings: str) -> None:
        given = {"HOST": "127.0.0.1", "PORT": "{port}", "DEVICE": device, "LOG_LEVEL": "warning"} | settings
        own = root / ".venv" / "bin" / "python"
        python = str(own) if own.exists() else sys.executable
        super().__init__([python, "app.py"], root, scratch / f"{self.name}.log", **given)

    def wait_all_ready(self) -> None:
        """Wait until each of several model processes is ready; /health says so of the first."""
        while any(device["status"] != "healthy" for device in self._devices()):
            time.sleep(0.1)

    def _devices(self) -> list[dict[str, str]]:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/info", timeout=60) as answer:
            found: list[dict[str, str]] = json.load(answer)["devices"]
        return found

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The web workers, and the model processes, which the supervisor has started."""
        roles: dict[str, list[psutil.Process]] = {"web": [], "model": []}
        for child in psutil.Process(self.pid).children():
            if any("supervisor" in part for part in child.cmdline()):
                roles["model"] += child.children(recursive=True)
            else:
                roles["web"].append(child)
        return roles


class Before(Service):
    """The service in another checkout, for comparison."""

    name = "before"


class Baseline(System):
    """The plain Flask view under `gunicorn -w 1 --threads 32`."""

    name = "baseline"

    def __init__(self, scratch: Path, device: str, model_folder: Path) -> None:
        command = [sys.executable, "-m", "gunicorn", "-w", "1", "--threads", "32", "--timeout", "300"]
        command += ["-b", "127.0.0.1:{port}", "baseline_flask:app"]
        super().__init__(
            command,
            ROOT / "benchmarks",  # a folder without gunicorn.conf.py
            scratch / "baseline.log",
            EMBEDDING_MODEL=str(model_folder),
            DEVICE="cuda" if device.startswith("cuda") else "cpu",
        )


class Infinity(System):
    """infinity-emb with its torch engine, from the virtual environment of `make bench-infinity`."""

    name = "infinity"
    path = "/embeddings"
    formats = ("float", "base64")

    def __init__(self, scratch: Path, device: str, model_folder: Path) -> None:
        command = [str(INFINITY), "v2", "--model-id", str(model_folder), "--served-model-name", "bench"]
        command += ["--engine", "torch", "--device", "cuda" if device.startswith("cuda") else "cpu"]
        command += ["--host", "127.0.0.1", "--port", "{port}", "--log-level", "warning"]
        super().__init__(
            command,
            scratch,
            scratch / "infinity.log",
            HF_HUB_OFFLINE="1",
            DO_NOT_TRACK="1",
            INFINITY_ANONYMOUS_USAGE_STATS="0",
        )

    def body(self, texts: list[str], encoding: str) -> bytes:
        return json.dumps({"model": "bench", "input": texts, "encoding_format": encoding}).encode()


# An API's path, and its request for some texts.
APIS: dict[str, tuple[str, Callable[[list[str]], dict[str, Any]]]] = {
    "tei": ("/embed", lambda texts: {"inputs": texts if len(texts) > 1 else texts[0], "truncate": True}),
    "openai": ("/v1/embeddings", lambda texts: {"input": texts, "model": "bench"}),
    "native": ("/embed", lambda texts: {"texts": texts if len(texts) > 1 else texts[0]}),
}


class Peer(System):
    """Any server: a shell command in which {port} is its port, or the http URL of one that runs already."""

    name = "peer"

    def __init__(self, scratch: Path, place: str, api: str) -> None:
        self.path, self._fields = APIS[api]
        self._runs_already = place.startswith("http")
        command = ["sleep", "infinity"] if self._runs_already else ["bash", "-c", f"exec env {place}"]
        super().__init__(command, ROOT, scratch / "peer.log")
        if self._runs_already:
            at = urlsplit(place)
            self.host, self.port = at.hostname or "", at.port or 80
            self.path = at.path.rstrip("/") or self.path

    def processes(self) -> dict[str, list[psutil.Process]]:
        return {} if self._runs_already else super().processes()

    def body(self, texts: list[str], encoding: str) -> bytes:
        return json.dumps(self._fields(texts)).encode()

    def wait_ready(self) -> float:
        """Wait until it embeds a text."""
        headers = {"Content-Type": "application/json"}
        while time.monotonic() - self.started < START_SECONDS and self._process.poll() is None:
            try:
                asked = urllib.request.Request(self.url, self.body(["ready?"], "float"), headers)
                with urllib.request.urlopen(asked, timeout=60):
                    return time.monotonic() - self.started
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise SystemExit(f"the peer answers {error.code}: {error.read(500)!r}") from None
            except OSError:
                pass
            time.sleep(0.05)
        ended = self._process.poll()
        what = f"was not ready in {START_SECONDS} s" if ended is None else f"ended with {ended}"
        raise SystemExit(f"the peer {what}:\n{self.log()[-2000:]}")


class Raw:
    """The raw engine in a process of its own, idle between calls."""

    name = "raw"

    def __init__(self, backend: str, device: str, dtype: str) -> None:
        command = [sys.executable, "-m", "benchmarks.raw_engine", "--stdin"]
        command += ["--backend", backend, "--device", device, "--dtype", dtype]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_ready(self) -> str:
        """Returns the name of the backend."""
        ready: str = self._read()["ready"]
        return ready

    def ask(self, do: str, **task: Any) -> Any:
        """Call a method of RawEngine in that process."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **task}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(15)

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the raw engine ended")
        return json.loads(line)
