"""How long starts take and how much memory a service holds, for two checkouts in turn.

python -m benchmarks.start OLD NEW [--starts 5]

Each checkout has its own CACHE_FOLDER, which a first start fills. Memory is the proportional share (PSS) of
all processes: ready, after a load of mixed lengths, and idle after it.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.systems import Service

# A service gives memory back once nothing has run for a while.
IDLE_SECONDS = 5
CLIENTS, REQUESTS, LENGTHS = 16, 400, (3, 12, 40, 120, 250)


def load(service: Service) -> None:
    """Texts of mixed lengths from several clients, and a few requests of 32 long ones."""

    def send(number: int) -> None:
        text = f"{number} " + "word " * LENGTHS[number % len(LENGTHS)]
        body = service.body([text] * (32 if number % 50 == 0 else 1), "float")
        request = urllib.request.Request(service.url, body, headers={"content-type": "application/json"})
        with contextlib.suppress(OSError):  # whatever its answer
            urllib.request.urlopen(request, timeout=60).read()

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(send, range(REQUESTS)))


def memory_mib(service: Service) -> float:
    """The proportional share of all processes."""
    parent = psutil.Process(service.pid)
    shares: int = sum(each.memory_full_info().pss for each in [parent, *parent.children(recursive=True)])
    return shares / 2**20


def recovery_seconds(service: Service) -> float:
    """From the death of the model process to the next 200."""
    (model,) = (
        each
        for each in service.processes()["model"]
        if any("embedding_service.sharing.server" in part for part in each.cmdline())
    )
    service.started = time.monotonic()
    model.kill()
    with contextlib.suppress(urllib.error.HTTPError):
        # The service notices after a moment that its model process is gone.
        while True:
            urllib.request.urlopen(f"http://{service.host}:{service.port}/health", timeout=5).close()
            time.sleep(0.005)
    return service.wait_ready()


def measure(checkout: Path, cache: Path) -> dict[str, float]:
    """One start, its memory, and a recovery."""
    service = Service(cache.parent, "auto", checkout, CACHE_FOLDER=str(cache))
    figures = {"start s": service.wait_ready(), "ready MiB": memory_mib(service)}
    load(service)
    figures["after load MiB"] = memory_mib(service)
    time.sleep(IDLE_SECONDS)
    figures["then idle MiB"] = memory_mib(service)
    figures["recovery s"] = recovery_seconds(service)
    service.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=lambda given: Path(given).resolve())
    parser.add_argument("--starts", type=int, default=5)
    given = parser.parse_args()
    found: dict[tuple[Path, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        caches = {checkout: Path(folder) / str(number) for number, checkout in enumerate(given.checkouts)}
        for checkout, cache in caches.items():
            first = Service(cache.parent, "auto", checkout, CACHE_FOLDER=str(cache))
            print(f"{checkout}: the first start took {first.wait_ready():.2f} s", flush=True)
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
