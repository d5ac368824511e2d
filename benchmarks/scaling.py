"""`python -m benchmarks.scaling` fits a capacity model to one instance and tests its predictions for more.

One, two and three instances, pinned to cores of this machine by taskset, run behind the shipped nginx.conf
under a continuous load from wrk. In the model, a request costs each process on its way a fixed number of CPU
seconds, so the rate is limited by the instances' cores or by all cores. The costs are taken from the first
row. They depend on the batch size and so on the number of open requests per instance, which is the same in
every row. A row that other programs disturbed is repeated.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import machine
from benchmarks.systems import ROOT, System
from benchmarks.texts import Texts
from embedding_service.inference import source
from tests.deploy.nginx import Nginx

WARM_SECONDS, BODIES = 5, 50

# A row is measured up to MAX_TRIES times, until other programs use less than QUIET_CORES.
MAX_TRIES, QUIET_CORES = 3, 0.05

Placement = list[list[int]]


class Instance(System):
    """An instance pinned to cores, listening on a port of this machine."""

    name = "embedding-service"
    _apart: tuple[str, ...] = ()

    def __init__(self, folder: Path, cores: list[int]) -> None:
        places = ",".join(map(str, cores))
        log = folder / f"instance-{places}-{os.urandom(2).hex()}.log"
        command = [*self._apart, "taskset", "--cpu-list", places, sys.executable, "app.py"]
        listen = "0.0.0.0" if self._apart else self.host
        super().__init__(command, ROOT, log, HOST=listen, PORT="{port}", DEVICE="cpu")

    @property
    def server(self) -> str:
        """The instance's line in nginx's upstream."""
        return f"server {self.host}:{self.port} max_fails=0;"

    def cpu_seconds(self) -> float:
        """CPU seconds that all its processes have used so far."""
        return tree_cpu_seconds(self._process.pid)


class HostApart(Instance):
    """An instance in its own network namespace, which it takes down with it; needs root and iproute2.

    The addresses are reserved for benchmarks (RFC 2544).
    """

    _apart = ("unshare", "--net")
    _numbers = itertools.count(1)

    def __init__(self, folder: Path, cores: list[int]) -> None:
        number = next(self._numbers)
        self.host = f"198.18.{number}.2"
        super().__init__(folder, cores)
        pid, link = str(self._process.pid), f"instance{number}"
        while Path(f"/proc/{pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        inside = ["nsenter", "--net", "--target", pid]
        for command in (
            ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", pid],
            ["ip", "address", "add", f"198.18.{number}.1/30", "dev", link],
            ["ip", "link", "set", link, "up"],
            [*inside, "ip", "address", "add", f"{self.host}/30", "dev", "eth0"],
            [*inside, "ip", "link", "set", "eth0", "up"],
        ):
            subprocess.run(command, check=True)


@dataclass
class Measured:
    """One row: requests per second, and CPU seconds per request."""

    rate: float
    p50_ms: float
    service: float
    nginx: float
    wrk: float
    other_cores: float


@dataclass
class Load:
    """Sends requests with these bodies, `connections` at a time to each instance."""

    bodies: Path
    connections: int
    seconds: int

    def run(self, nginx: Nginx, instances: int, seconds: int) -> tuple[dict[str, float], float]:
        """wrk's result, and the CPU seconds that wrk itself used."""
        command = ["wrk", "-t1", f"-c{self.connections * instances}", f"-d{seconds}s", "--timeout", "60s"]
        command += ["-s", str(ROOT / "benchmarks" / "load.lua"), nginx.url]
        before = os.times()
        done = subprocess.run(
            [*command, "--", str(self.bodies), "/embed"], capture_output=True, text=True, check=True
        )
        after = os.times()
        [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return json.loads(line.removeprefix("RESULT ")), used


def placements() -> dict[str, Placement]:
    """The cores that each instance may use; wrk and nginx may use all."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise SystemExit("two cores are needed")
    a, b = available[:2]
    return {
        "one, on one core": [[a]],
        "two, a core each": [[a], [b]],
        "three, a core each for two, both for the third": [[a], [b], [a, b]],
        "one, on two cores": [[a, b]],
    }


def measure_quietly(kind: type[Instance], placement: Placement, load: Load) -> Measured:
    """The first row that other programs did not disturb, or the one that they disturbed least."""
    rows: list[Measured] = []
    while len(rows) < MAX_TRIES and not (rows and rows[-1].other_cores < QUIET_CORES):
        rows.append(measure(kind, placement, load))
    return min(rows, key=lambda row: row.other_cores)


def measure(kind: type[Instance], placement: Placement, load: Load) -> Measured:
    """Start the instances, measure them under load, and stop them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        instances: list[Instance] = []
        try:
            for cores in placement:
                instances.append(kind(folder, cores))
            for instance in instances:
                instance.wait_ready()
            replaced = {
                "server embedding:8001 max_fails=0;": " ".join(instance.server for instance in instances),
                "rate=100r/s": "rate=9999r/s",
            }
            nginx = Nginx(folder, [], **replaced)
            try:
                load.run(nginx, len(instances), WARM_SECONDS)
                return _measure(instances, nginx, load)
            finally:
                nginx.stop()
        finally:
            for instance in instances:
                instance.stop()


def _measure(instances: list[Instance], nginx: Nginx, load: Load) -> Measured:
    def used() -> tuple[float, float, float]:
        busy = psutil.cpu_times()
        return (
            sum(instance.cpu_seconds() for instance in instances),
            tree_cpu_seconds(nginx.process.pid),
            busy.user + busy.nice + busy.system + busy.irq + busy.softirq + busy.steal,
        )

    before = used()
    result, wrk_seconds = load.run(nginx, len(instances), load.seconds)
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
        other_cores=max(0.0, busy - service - proxy - wrk_seconds) / result["seconds"],
    )


def tree_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its descendants."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def predict(fitted: Measured, placement: Placement) -> float:
    """The predicted requests per second of a placement, from the costs in the row of one instance."""
    own_cores = len({core for cores in placement for core in cores})
    everything = fitted.service + fitted.nginx + fitted.wrk
    return min(own_cores / fitted.service, machine.cores() / everything)


def main() -> None:
    """Measure every placement and print the table of docs/scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts", type=int, default=8, help="texts per request")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per text")
    parser.add_argument("--connections", type=int, default=16, help="open requests per instance")
    parser.add_argument("--seconds", type=int, default=30, help="seconds per row")
    parser.add_argument(
        "--namespaces", action="store_true", help="run each instance in its own network namespace (as root)"
    )
    options = parser.parse_args()
    texts = Texts(source.resolve(source.DEFAULT_MODEL, None).folder)
    kind = HostApart if options.namespaces else Instance
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as bodies:
        for _ in range(BODIES):
            bodies.write(json.dumps({"texts": texts.of_length(options.tokens, options.texts)}) + "\n")
        bodies.flush()
        load = Load(Path(bodies.name), options.connections, options.seconds)
        rows = {
            name: (placement, measure_quietly(kind, placement, load))
            for name, placement in placements().items()
        }
    _, fitted = next(iter(rows.values()))
    print(
        f"Texts a request: {options.texts}, of {options.tokens} tokens; requests that an instance has open: "
        f"{options.connections}; {options.seconds} s a row; "
        f"{machine.describe()['cpu']}, {machine.cores()} cores; commit {machine.commit()}.\n"
    )
    print("| instances | req/s predicted | measured | off by | latency predicted | p50 | CPU ms | others |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (placement, row) in rows.items():
        rate = predict(fitted, placement)
        latency_ms = 1e3 * options.connections * len(placement) / rate
        costs = " + ".join(f"{1e3 * cost:.2f}" for cost in (row.service, row.nginx, row.wrk))
        print(
            f"| {name} | {rate:.1f} | {row.rate:.1f} | {row.rate / rate - 1:+.0%} "
            f"| {latency_ms:.0f} ms | {row.p50_ms:.0f} ms | {costs} | {row.other_cores:.2f} |"
        )


if __name__ == "__main__":
    main()
