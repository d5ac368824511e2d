"""Measures the systems under open-loop load: `make bench-open`, or `python -m benchmarks.open_loop --help`.

Requests arrive at random (Poisson), whether or not earlier ones have been answered, at shares of what the
service answers in a closed loop. A latency counts from the arrival, so that a server that falls behind hides
nothing (no coordinated omission). The systems take turns at each load, while the others are idle.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, machine, report
from benchmarks.run import BULK, RESULTS, SCENARIOS, Bench, Scenario, parsed
from benchmarks.systems import System

LOADS = ("one-32", "mix", "256-tokens", "beside-bulk")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.5)

# Goodput counts answers that a person would still wait for.
GOOD_SECONDS = 1.0
TIMEOUT_SECONDS = 60.0


class Arrivals:
    """Requests to one server at a mean rate; each takes an idle connection, or else opens one."""

    def __init__(self, url: str, bodies: Path) -> None:
        self._address, self._requests = load.requests_of(url, bodies)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.latencies: list[float] = []
        self.refused = 0

    async def run(self, rate: float, seconds: float) -> None:
        """Send for this long, and wait for the last answers."""
        gaps = np.random.default_rng(1).exponential(1 / rate, round(2 * rate * seconds) + 10)
        began = time.perf_counter()
        running = []
        for number, at in enumerate(began + gaps.cumsum()):
            if at > began + seconds:
                break
            await asyncio.sleep(at - time.perf_counter())
            request = self._requests[number % len(self._requests)]
            running.append(asyncio.create_task(self._send(request, at)))
        if running:
            _, late = await asyncio.wait(running, timeout=TIMEOUT_SECONDS)
            self.refused += len(late)
            for task in late:
                task.cancel()
        for _, writer in self._idle:
            writer.close()

    async def _send(self, request: bytes, at: float) -> None:
        try:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r")[0]))
        except (OSError, asyncio.IncompleteReadError):
            self.refused += 1
            return
        self._idle.append((reader, writer))
        if head.split()[1] == b"200":
            self.latencies.append(time.perf_counter() - at)
        else:
            self.refused += 1


def measure(
    bench: Bench, server: System, scenario: Scenario, rate: float, seconds: float
) -> dict[str, float]:
    """What a system did with requests that arrive at this rate."""
    bulk = None
    if scenario.beside_bulk:
        bodies = str(bench.bodies(server, BULK))
        command = [sys.executable, load.__file__, server.url, bodies, str(seconds + 1), str(BULK.clients)]
        bulk = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        time.sleep(1)
    before = sum(server.cpu_by_role().values())
    arrivals = Arrivals(server.url, bench.bodies(server, scenario))
    asyncio.run(arrivals.run(rate, seconds))
    used = sum(server.cpu_by_role().values()) - before
    if bulk is not None:
        bulk.communicate()
    latencies = np.array(arrivals.latencies or [float("inf")])
    return {
        "p50_ms": float(np.median(latencies)) * 1e3,
        "p99_ms": float(np.percentile(latencies, 99, method="lower")) * 1e3,
        "goodput": float((latencies <= GOOD_SECONDS).sum()) / seconds,
        "refused": arrivals.refused,
        "cores": used / seconds,
    }


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The content of the results file."""
    arguments.systems = [name for name in arguments.systems if name not in ("raw", "baseline")]
    arguments.only = arguments.only or LOADS
    bench = Bench(arguments, scratch)
    loads = []
    about = machine.describe()
    with bench.started() as (_, servers, _):
        for scenario in SCENARIOS:
            if scenario.name not in arguments.only:
                continue
            closed = bench.load(servers[0], scenario, round(arguments.seconds))
            capacity = closed["texts_per_second"] / scenario.texts
            points = []
            for share in SHARES:
                seen = {
                    server.name: measure(bench, server, scenario, share * capacity, arguments.seconds)
                    for server in servers
                }
                points.append({"offered": share * capacity, "share": share, "systems": seen})
                print(scenario.title, f"{share * capacity:.1f}/s", json.dumps(seen), flush=True)
            loads.append({"name": scenario.name, "title": scenario.title, "points": points})
    about_run = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": machine.commit(),
        "machine": about,
    }
    return about_run | {"seconds": arguments.seconds, "loads": loads}


def table(results: dict[str, Any]) -> str:
    """The results as a markdown table."""
    names = list(results["loads"][0]["points"][0]["systems"])
    lines = ["| load | offered | " + " | ".join(report.LABELS[name] for name in names) + " |"]
    lines.append("|---|---:|" + "---:|" * len(names))
    for each in results["loads"]:
        title = each["title"].split(", ")[0] + (" beside bulk" if each["name"] == "beside-bulk" else "")
        for point in each["points"]:
            cells = [
                f"{seen['goodput']:.1f}/s<br>{seen['p50_ms']:.1f} / {seen['p99_ms']:.1f} ms<br>"
                f"{seen['cores']:.2f} cores"
                for seen in point["systems"].values()
            ]
            lines.append(
                f"| {title} | {point['offered']:.1f}/s ({point['share']:.0%}) | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Latency and goodput against the offered load."""
    pyplot = report.plotter()
    loads = results["loads"]
    figure, axes = pyplot.subplots(2, len(loads), figsize=(3.2 * len(loads), 5), squeeze=False)
    for column, each in enumerate(loads):
        offered = [point["offered"] for point in each["points"]]
        above, below = axes[0][column], axes[1][column]
        for name in each["points"][0]["systems"]:
            seen = [point["systems"][name] for point in each["points"]]
            color, label = report.COLORS[name], report.LABELS[name]
            above.plot(offered, [one["p50_ms"] for one in seen], color=color, label=f"{label}, p50")
            above.plot(
                offered, [one["p99_ms"] for one in seen], color=color, linestyle=":", label=f"{label}, p99"
            )
            below.plot(offered, [one["goodput"] for one in seen], color=color, label=label)
        above.set_yscale("log")
        above.set_title(each["title"].replace(", beside", ",\nbeside"), fontsize=8)
        below.set_xlabel("requests per second that arrive", fontsize=8)
    axes[0][0].set_ylabel("ms", fontsize=8)
    axes[1][0].set_ylabel(f"answers per second within {GOOD_SECONDS:.0f} s", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    arguments = parsed(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    with tempfile.TemporaryDirectory() as scratch:
        results = run(arguments, Path(scratch))
    print(table(results))
    if not arguments.quick:
        label = str(RESULTS / (arguments.label or f"{results['date']}-open"))
        Path(f"{label}.json").write_text(json.dumps(results, indent=1) + "\n")
        Path(f"{label}.md").write_text(table(results) + "\n")
        plot(results, Path(f"{label}.svg"))


if __name__ == "__main__":
    main()
