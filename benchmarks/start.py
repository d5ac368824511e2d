"""How long starts take and how much memory a service holds, for two checkouts in turn.

python -m benchmarks.start OLD NEW [--starts 5]

Each checkout has its own CACHE_FOLDER, which a first start fills. Memory is the proportional share (PSS) of
all processes: ready, after a load of mixed lengths, and idle after it.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# A service gives memory back once nothing has run for a while.
IDLE_SECONDS = 5
CLIENTS, REQUESTS, LENGTHS = 16, 400, (3, 12, 40, 120, 250)


class Service:
    """One running checkout, ready."""

    def __init__(self, checkout: Path, cache: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        given = {"HOST": "127.0.0.1", "PORT": str(port), "CACHE_FOLDER": str(cache)}
        environment = {**os.environ, **given}
        began = time.monotonic()
        self._process = subprocess.Popen(
            [".venv/bin/python", "app.py"], cwd=checkout, env=environment, stderr=subprocess.DEVNULL
        )
        self.wait()
        self.start_seconds = time.monotonic() - began

    def wait(self) -> None:
        """Wait for a 200 from /health."""
        while True:
            try:
                urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.01)

    def embed(self, texts: list[str]) -> None:
        """Send a request, whatever its answer."""
        body = json.dumps({"texts": texts}).encode()
        request = urllib.request.Request(
            f"{self._url}/embed", body, headers={"content-type": "application/json"}
        )
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(request, timeout=60).read()

    def load(self) -> None:
        """Texts of mixed lengths from several clients, and a few requests of 32 long ones."""
        texts = [
            [f"{number} " + "word " * LENGTHS[number % len(LENGTHS)]] * (32 if number % 50 == 0 else 1)
            for number in range(REQUESTS)
        ]
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(self.embed, texts))

    def processes(self) -> list[int]:
        """The ids of all processes."""
        found = [self._process.pid]
        for number in found:
            for path in Path(f"/proc/{number}/task").glob("*/children"):
                found += map(int, path.read_text().split())
        return found

    def memory_mib(self) -> float:
        """The proportional share of all processes."""
        shares = 0
        for number in self.processes():
            lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
            shares += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return shares / 1024

    def recovery_seconds(self) -> float:
        """From the death of the model process to the next 200."""
        (model,) = [
            number
            for number in self.processes()
            if b"embedding_service.sharing.server" in Path(f"/proc/{number}/cmdline").read_bytes()
        ]
        began = time.monotonic()
        os.kill(model, signal.SIGKILL)
        while Path(f"/proc/{model}").exists():
            time.sleep(0.01)
        self.wait_until_gone()
        self.wait()
        return time.monotonic() - began

    def wait_until_gone(self) -> None:
        """Wait for the service to notice that its model process is gone."""
        while True:
            try:
                urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
                time.sleep(0.005)
            except urllib.error.HTTPError:
                return

    def stop(self) -> None:
        """End the service."""
        self._process.terminate()
        self._process.wait(30)


def measure(checkout: Path, cache: Path) -> dict[str, float]:
    """One start, its memory, and a recovery."""
    service = Service(checkout, cache)
    figures = {"start s": service.start_seconds, "ready MiB": service.memory_mib()}
    service.load()
    figures["after load MiB"] = service.memory_mib()
    time.sleep(IDLE_SECONDS)
    figures["then idle MiB"] = service.memory_mib()
    figures["recovery s"] = service.recovery_seconds()
    service.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--starts", type=int, default=5)
    given = parser.parse_args()
    found: dict[tuple[Path, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        caches = {checkout: Path(folder) / str(number) for number, checkout in enumerate(given.checkouts)}
        for checkout, cache in caches.items():
            first = Service(checkout, cache)
            print(f"{checkout}: the first start took {first.start_seconds:.2f} s", flush=True)
            first.stop()
        for _ in range(given.starts):
            for checkout, cache in caches.items():
                for name, value in measure(checkout, cache).items():
                    found[checkout, name].append(value)
    old, new = given.checkouts
    for name in dict.fromkeys(name for _, name in found):
        before, after = (statistics.median(found[one, name]) for one in (old, new))
        print(f"{name:>15} {before:9.2f} {after:9.2f}   {after / before:.2f} x")


if __name__ == "__main__":
    main()
