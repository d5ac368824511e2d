"""Counts our functions and files on the path of a request: `python -m benchmarks.path [--list]`.

Counted are functions that run at least once for each request of one text, in the web worker and in the model
process together, and the files that they are in.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2

from benchmarks.systems import ROOT, Service

COUNTED = ROOT / "benchmarks" / "counted"
REQUESTS = 20


class Counts:
    """The calls of each function in the processes of a service."""

    def __init__(self, folder: Path, pids: list[int]) -> None:
        self._folder, self._pids = folder, pids

    def read(self) -> Counter[str]:
        """The calls until now, by process and function."""
        calls: Counter[str] = Counter()
        for pid in self._pids:
            wanted, written = self._folder / f"{pid}.wanted", self._folder / f"{pid}.json"
            wanted.touch()
            while wanted.exists() or not written.exists():
                time.sleep(0.01)
            calls.update(json.loads(written.read_text()))
            written.unlink()
        return calls


def on_path(requests: int) -> dict[str, float]:
    """Calls per request of each function that runs for every request."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        service = Service(scratch, "cpu", PYTHONPATH=str(COUNTED), COUNTED=name, WEB_CONCURRENCY="1")
        try:
            service.wait_ready()
            counts = Counts(
                scratch, [one.pid for processes in service.processes().values() for one in processes]
            )
            with httpx2.Client(base_url=f"http://127.0.0.1:{service.port}") as client:
                for number in range(requests * 2):
                    if number == requests:
                        before = counts.read()
                    client.post("/embed", json={"texts": f"text {number}"}).raise_for_status()
            calls = counts.read()
        finally:
            service.stop()
    return {name: n / requests for name, n in sorted((calls - before).items()) if n >= requests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name them")
    arguments = parser.parse_args()
    calls = on_path(REQUESTS)
    if arguments.list:
        for name, number in calls.items():
            print(f"{number:6.1f}  {name}")
    files = {name.split(" ")[0] for name in calls}
    print(f"{len(calls)} functions in {len(files)} files, {sum(calls.values()):.0f} calls")


if __name__ == "__main__":
    main()
