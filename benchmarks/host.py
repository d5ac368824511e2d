"""Measures the service without its model: `make bench-host`, or `python -m benchmarks.host --help`.

The model process runs with benchmarks/instant on its PYTHONPATH, so the forward pass takes no time; the rest
is unchanged. An empty Flask view under stock gunicorn is measured in the same run, with the same load
generator (wrk). CPU time is that of all threads of a process, from /proc. Figures are medians of alternating
turns. With `--checkout DIR` the service in that folder takes turns with this one.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from benchmarks import machine
from benchmarks.systems import ROOT, Before, Service, System
from benchmarks.texts import Texts
from embedding_service.inference import source

LUA = ROOT / "benchmarks" / "load.lua"
RESULTS = ROOT / "benchmarks" / "results"
SENTENCES, WARM_SECONDS = 4096, 1
IDLE_CLIENTS, SLOW_CLIENTS = 2000, 200
# Most that the service may take of what another checkout takes: a load, a figure, and the share.
BARS = [
    ("one-32", "model_us_per_request", 0.45),
    ("one-32", "web_us_per_request", 0.85),
    ("one-1", "p50_ms", 0.7),
]
# A text of a large request may cost the model process this much more than tokenizing it.
HOST_US = 5.0


@dataclass(frozen=True)
class Scenario:
    """A load: texts per request, clients, JSON or base64, and web workers."""

    texts: int
    clients: int
    base64: bool = False
    workers: int = 1
    crowd: bool = False

    @property
    def name(self) -> str:
        base = f"one-{self.clients}" if self.texts == 1 else f"texts-{self.texts}"
        marks = ("-base64", self.base64), ("-2-workers", self.workers == 2), ("-crowd", self.crowd)
        return base + "".join(mark for mark, applies in marks if applies)

    @property
    def title(self) -> str:
        parts = [
            f"{self.texts} text{'s' * (self.texts > 1)}, {self.clients} client{'s' * (self.clients > 1)}"
        ]
        parts += ["base64"] * self.base64 + ["2 workers"] * (self.workers == 2)
        parts += [f"with {IDLE_CLIENTS:,} idle and {SLOW_CLIENTS} slow clients"] * self.crowd
        return ", ".join(parts)


LOADS = [(1, 1), (1, 32), (1, 64), (32, 4), (256, 4)]
SCENARIOS = [
    Scenario(texts, clients, base64, workers)
    for workers, base64, (texts, clients) in itertools.product((1, 2), (False, True), LOADS)
]
# Runs only if it is named, for comparison with `one-32`: it needs more than a thousand file descriptors.
CROWDED = Scenario(1, 32, crowd=True)


class EmptyFlask(System):
    """A view that does nothing, under `gunicorn -w 1 --threads 32`."""

    name = "empty Flask view"

    def __init__(self, scratch: Path) -> None:
        command = [sys.executable, "-m", "gunicorn", "-w", "1", "--threads", "32"]
        command += ["-b", "127.0.0.1:{port}", "empty_flask:app"]
        # A folder without gunicorn.conf.py.
        super().__init__(command, ROOT / "benchmarks", scratch / "empty.log")

    def processes(self) -> dict[str, list[psutil.Process]]:
        return {"web": psutil.Process(self.pid).children()}


def instant(scratch: Path, workers: int, root: Path | None) -> Service:
    """The service, here or in another checkout, with a model that takes no time."""
    scratch = scratch / f"{workers}-workers-{'before' if root else 'now'}"
    scratch.mkdir()
    kind = Before if root else Service
    # Each checkout has a stand-in for its own model.
    path = str((root or ROOT) / "benchmarks" / "instant")
    return kind(scratch, "cpu", root or ROOT, PYTHONPATH=path, WEB_CONCURRENCY=str(workers))


class Bench:
    """One run: the servers and their turns."""

    def __init__(
        self, seconds: int, turns: int, scenarios: list[Scenario], checkout: Path | None, scratch: Path
    ) -> None:
        self._seconds, self._turns, self._scenarios, self._scratch = seconds, turns, scenarios, scratch
        self._roots = {"service": None} | ({"before": checkout.resolve()} if checkout else {})
        model = source.resolve(source.DEFAULT_MODEL, None).folder
        self._texts = Texts(model).sentences(SENTENCES)
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._tokenizer.no_padding()

    def measure(self) -> dict[str, Any]:
        """The content of the results file."""
        about = machine.describe()
        empty: list[dict[str, float]] = []
        turns: dict[tuple[str, str], list[dict[str, float]]] = {}
        with contextlib.ExitStack() as running:
            flask = EmptyFlask(self._scratch)
            running.callback(flask.stop)
            services: dict[tuple[str, int], Service] = {}
            for workers in sorted({scenario.workers for scenario in self._scenarios}):
                for name, root in self._roots.items():
                    services[name, workers] = instant(self._scratch, workers, root)
                    running.callback(services[name, workers].stop)
            for system in (flask, *services.values()):
                system.wait_ready()
            self._load(flask, Scenario(1, 32), WARM_SECONDS)
            for (_, workers), service in services.items():
                for scenario in self._scenarios:
                    if scenario.workers == workers:
                        self._load(service, scenario, WARM_SECONDS)
            for _ in range(self._turns):
                empty.append(self._empty(flask))
                for scenario, name in itertools.product(self._scenarios, self._roots):
                    turn = self._turn(services[name, scenario.workers], scenario)
                    turns.setdefault((scenario.name, name), []).append(turn)
        return {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": machine.commit(),
            "machine": about,
            "settings": {"seconds_a_turn": self._seconds, "turns": self._turns},
            "empty_flask_view_us": _median(empty)["us_per_request"],
            "empty_flask_view": _median(empty),
            "scenarios": [self._scenario(s, turns[s.name, "service"]) for s in self._scenarios],
            "before": [
                self._scenario(s, turns[s.name, "before"]) for s in self._scenarios if "before" in self._roots
            ],
        }

    def _scenario(self, scenario: Scenario, turns: list[dict[str, float]]) -> dict[str, Any]:
        about = {"name": scenario.name, "title": scenario.title, "texts": scenario.texts}
        both = [round(turn["web_us_per_request"] + turn["model_us_per_request"], 1) for turn in turns]
        tokenizer = {"tokenizer_us_per_text": self._tokenizer_us(scenario.texts)}
        return about | _median(turns) | tokenizer | {"us_per_request_of_turns": both}

    def _empty(self, flask: EmptyFlask) -> dict[str, float]:
        before = flask.cpu_by_role()["web"]
        seen = self._load(flask, Scenario(1, 32), self._seconds)
        used = flask.cpu_by_role()["web"] - before
        return {
            "requests_per_second": seen["requests"] / seen["seconds"],
            "p50_ms": seen["p50_ms"],
            "p99_ms": seen["p99_ms"],
            "us_per_request": used / seen["requests"] * 1e6,
        }

    def _turn(self, service: Service, scenario: Scenario) -> dict[str, float]:
        with _crowd(service.port) if scenario.crowd else contextlib.nullcontext():
            before = service.cpu_by_role()
            seen = self._load(service, scenario, self._seconds)
            after = service.cpu_by_role()
        web_us, model_us = (
            (after[role] - before[role]) / seen["requests"] * 1e6 for role in ("web", "model")
        )
        rate = seen["requests"] / seen["seconds"]
        return {
            "requests_per_second": rate,
            "texts_per_second": rate * scenario.texts,
            "p50_ms": seen["p50_ms"],
            "p99_ms": seen["p99_ms"],
            "web_us_per_request": web_us,
            "model_us_per_request": model_us,
            "model_us_per_text": model_us / scenario.texts,
        }

    def _load(self, system: System, scenario: Scenario, seconds: int) -> dict[str, float]:
        bodies = self._scratch / f"{scenario.texts}-{scenario.base64}.txt"
        if not bodies.exists():
            encoding = "base64" if scenario.base64 else "float"
            starts = range(0, len(self._texts), scenario.texts)
            bodies.write_bytes(
                b"\n".join(
                    system.body(self._texts[start : start + scenario.texts], encoding) for start in starts
                )
            )
        command = ["wrk", "-t1", f"-c{scenario.clients}", f"-d{seconds}s", "--timeout", "60s"]
        command += ["-s", str(LUA), system.url, "--", str(bodies), system.path]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result: dict[str, float] = json.loads(output.rpartition("RESULT ")[2])
        if result["errors"]:
            raise SystemExit(f"{system.name} failed {result['errors']} requests of {scenario.title}")
        return result

    def _tokenizer_us(self, texts: int) -> float:
        """CPU time of the Rust tokenizer per text, in one thread and in requests of this many texts."""
        starts = range(0, SENTENCES, texts)
        took = []
        for _ in range(3):
            began = time.thread_time()
            for start in starts:
                self._tokenizer.encode_batch_fast(self._texts[start : start + texts])
            took.append((time.thread_time() - began) / SENTENCES * 1e6)
        return round(statistics.median(took), 1)


@contextlib.contextmanager
def _crowd(port: int) -> Iterator[None]:
    """Clients that keep their connections after one request, and others that send a byte per second."""
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(IDLE_CLIENTS)]
    for sock in idle:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    for sock in idle:
        if not sock.recv(4096).startswith(b"HTTP/1.1 200"):
            raise SystemExit("an idle client got no response")
    stop = threading.Event()
    slow = threading.Thread(target=_drip, args=(port, stop))
    slow.start()
    try:
        yield
    finally:
        stop.set()
        slow.join()
        for sock in idle:
            sock.close()


def _drip(port: int, stop: threading.Event) -> None:
    """Send requests very slowly, some in the headers and some in the body; reconnect those cut off."""
    heads = itertools.cycle([b"", b"Content-Length: 10000\r\n\r\n{"])
    sockets: list[socket.socket | None] = [None] * SLOW_CLIENTS
    for index in itertools.cycle(range(SLOW_CLIENTS)):
        if stop.wait(1 / SLOW_CLIENTS):
            break
        try:
            if (sock := sockets[index]) is None:
                sock = sockets[index] = socket.create_connection(("127.0.0.1", port))
                sock.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\n" + next(heads))
            sock.send(b"a")
        except OSError:
            sockets[index] = None
    for sock in sockets:
        if sock is not None:
            sock.close()


def _median(turns: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(turn[key] for turn in turns), 3) for key in turns[0]}


def markdown(results: dict[str, Any]) -> str:
    """A table, and a note on the machine and the method."""
    lines = [
        "| load | requests/s | texts/s | p50 / p99, ms | web, µs per request | model process, µs per request "
        "| both, × empty view | model process, µs per text | tokenizer alone, µs per text |",
        "|---|" + "---:|" * 8,
    ]
    empty = results["empty_flask_view"]
    lines.append(
        f"| empty Flask view, 32 clients | {empty['requests_per_second']:.0f} | | {empty['p50_ms']:.2f} / "
        f"{empty['p99_ms']:.2f} | {empty['us_per_request']:.0f} | | 1.00 | | |"
    )
    before = {row["name"]: row | {"title": f"{row['title']}, before"} for row in results["before"]}
    pairs = [(before.get(row["name"]), row) for row in results["scenarios"]]
    for row in filter(None, itertools.chain.from_iterable(pairs)):
        web, model = row["web_us_per_request"], row["model_us_per_request"]
        lines.append(
            f"| {row['title']} | {row['requests_per_second']:.0f} | {row['texts_per_second']:.0f} "
            f"| {row['p50_ms']:.2f} / {row['p99_ms']:.2f} | {web:.0f} | {model:.0f} "
            f"| {(web + model) / empty['us_per_request']:.2f} | {row['model_us_per_text']:.1f} "
            f"| {row['tokenizer_us_per_text']:.1f} |"
        )
    about, settings = results["machine"], results["settings"]
    note = (
        f"The model answers at once. {about['cpu']}, {about['cores']} cores, which the load generator "
        f"shares; medians of {settings['turns']} alternating turns of {settings['seconds_a_turn']} s; "
        f"commit {results['commit']}, {results['date']}."
    )
    return "\n".join([*lines, "", note])


def verdicts(results: dict[str, Any]) -> str:
    """Each target that this run can judge, with the measured figure."""
    now, before = ({row["name"]: row for row in results[key]} for key in ("scenarios", "before"))
    lines = []
    for name, figure, bar in BARS:
        if name in now and name in before:
            share = now[name][figure] / before[name][figure]
            lines.append(
                (share <= bar, f"{now[name]['title']}: {figure} {share:.2f} x before, bar {bar:.2f}")
            )
    for name in ("texts-32", "texts-256"):
        if name in now:
            cost, most = now[name]["model_us_per_text"], now[name]["tokenizer_us_per_text"] + HOST_US
            lines.append((cost <= most, f"{now[name]['title']}: {cost:.1f} µs per text, bar {most:.1f}"))
    return "\n".join(f"{'reached' if reached else 'NOT REACHED':>11}  {line}" for reached, line in lines)


def main() -> None:
    known = {scenario.name: scenario for scenario in [*SCENARIOS, CROWDED]}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=2, help="length of a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each scenario")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=" ".join(known))
    parser.add_argument(
        "--checkout", type=Path, metavar="DIR", help="another version of the service, to compare"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file only")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed (Debian: apt-get install wrk)")
    scenarios = [known[name] for name in arguments.only] if arguments.only else SCENARIOS
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        results = Bench(
            arguments.seconds, arguments.turns, scenarios, arguments.checkout, Path(scratch)
        ).measure()
    print(markdown(results), verdicts(results), sep="\n\n")
    written = json.dumps(results, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(written)
    elif not arguments.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{results['date']}-host.json").write_text(written)
        (RESULTS / f"{results['date']}-host.md").write_text(markdown(results) + "\n")
        print(f"Written: benchmarks/results/{results['date']}-host.json and .md")


if __name__ == "__main__":
    main()
