"""`python -m benchmarks.scaling`: a capacity model fitted to one instance, and its predictions for more.

One, two and three instances behind the shipped nginx.conf, pinned to cores of this machine by taskset,
are loaded through wrk without a pause. The model is one sentence: a request costs each process on its way a
fixed number of CPU seconds, so requests a second are the CPU seconds that there are, divided by that sum.
The costs are fitted to the first row alone. What other programs took of the cores is measured and deducted.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import machine
from benchmarks.systems import ROOT, System
from benchmarks.texts import Texts
from embedding_service.inference import source
from tests.deploy.nginx import Nginx

SECONDS, WARM_SECONDS, CONNECTIONS = 15, 4, 16
TEXTS, TOKENS, BODIES = 8, 64, 50

# The cores that each instance may use; wrk and nginx use what they find.
PLACEMENTS = {
    "one instance, one core": [[0]],
    "two instances, a core each": [[0], [1]],
    "three instances, a core each for two, both for the third": [[0], [1], [0, 1]],
    "one instance, two cores": [[0, 1]],
}


class Instance(System):
    """An instance pinned to cores."""

    name = "embedding-service"

    def __init__(self, folder: Path, cores: list[int]) -> None:
        places = ",".join(map(str, cores))
        log = folder / f"instance-{places}-{os.urandom(2).hex()}.log"
        command = ["taskset", "--cpu-list", places, sys.executable, "app.py"]
        super().__init__(command, ROOT, log, HOST="127.0.0.1", PORT="{port}", DEVICE="cpu")

    def cpu_seconds(self) -> float:
        """What all its processes have used so far."""
        return tree_cpu_seconds(self._process.pid)


@dataclass
class Measured:
    """One row: requests a second, and CPU seconds of a request."""

    rate: float
    p50_ms: float
    service: float
    nginx: float
    wrk: float
    background_cores: float

    @property
    def cost(self) -> float:
        """CPU seconds of a request, all in all."""
        return self.service + self.nginx + self.wrk


def measure(placement: list[list[int]], bodies: Path) -> Measured:
    """Start the instances, load them for a while, end them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        instances = [Instance(folder, cores) for cores in placement]
        try:
            for instance in instances:
                instance.wait_ready()
            nginx = Nginx(
                folder, [instance.port for instance in instances], **{"rate=100r/s": "rate=9999r/s"}
            )
            try:
                load(nginx, bodies, WARM_SECONDS)
                return _measure(instances, nginx, bodies)
            finally:
                nginx.stop()
        finally:
            for instance in instances:
                instance.stop()


def _measure(instances: list[Instance], nginx: Nginx, bodies: Path) -> Measured:
    def used() -> tuple[float, float, float]:
        busy = psutil.cpu_times()
        return (
            sum(instance.cpu_seconds() for instance in instances),
            tree_cpu_seconds(nginx.process.pid),
            busy.user + busy.nice + busy.system + busy.irq + busy.softirq + busy.steal,
        )

    before = used()
    result, wrk_seconds = load(nginx, bodies, SECONDS)
    service, proxy, busy = (after - first for first, after in zip(before, used(), strict=True))
    if result["errors"] or not result["requests"]:
        raise SystemExit(f"nothing to measure: {result}")
    count = result["requests"]
    return Measured(
        rate=count / result["seconds"],
        p50_ms=result["p50_ms"],
        service=service / count,
        nginx=proxy / count,
        wrk=wrk_seconds / count,
        background_cores=max(0.0, busy - service - proxy - wrk_seconds) / result["seconds"],
    )


def load(nginx: Nginx, bodies: Path, seconds: int) -> tuple[dict[str, float], float]:
    """wrk's result, and the CPU seconds that wrk used itself."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(ROOT / "benchmarks" / "load.lua"), nginx.url, "--", str(bodies), "/embed"]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return json.loads(line.removeprefix("RESULT ")), used


def tree_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and all below it."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def predict(fitted: Measured, placement: list[list[int]], background_cores: float) -> float:
    """Requests a second of a placement, from the costs of one instance on one core."""
    cores = {core for cores in placement for core in cores}
    total = machine.cores() - background_cores
    if len(cores) < machine.cores():
        # The instance's own core is the limit; wrk and nginx sit on the other ones.
        return (len(cores) - background_cores / machine.cores()) / fitted.service
    return total / fitted.cost


def main() -> None:
    """Measure every placement and print the table of docs/scaling.md."""
    texts = Texts(source.resolve(source.DEFAULT_MODEL, None).folder)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as bodies:
        for _ in range(BODIES):
            bodies.write(json.dumps({"texts": texts.of_length(TOKENS, TEXTS)}) + "\n")
        bodies.flush()
        rows = {name: measure(cores, Path(bodies.name)) for name, cores in PLACEMENTS.items()}
    fitted = next(iter(rows.values()))
    print(f"{TEXTS} texts of {TOKENS} tokens a request, {CONNECTIONS} connections, {SECONDS} s a row; ")
    print(f"{machine.describe()['cpu']}, {machine.cores()} cores.\n")
    print(
        "| instances | predicted req/s | measured | off by | p50 ms | service, nginx, wrk: CPU ms | others |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        predicted = predict(fitted, PLACEMENTS[name], row.background_cores)
        costs = ", ".join(f"{1e3 * cost:.2f}" for cost in (row.service, row.nginx, row.wrk))
        print(
            f"| {name} | {predicted:.1f} | {row.rate:.1f} | {row.rate / predicted - 1:+.0%} "
            f"| {row.p50_ms:.0f} | {costs} | {row.background_cores:.2f} cores |"
        )


if __name__ == "__main__":
    main()
