"""Measures the systems side by side: `make bench`, or `python -m benchmarks.run --help`.

All systems are started first. Then, for each scenario, they are measured in turn, several times, while the
others are idle. A system's figure is the median of its turns. wrk makes a closed-loop load: each client
sends its next request when it has received the previous response. `--peer` adds any other server, and
`--checkout` another version of the service.
"""

import argparse
import contextlib
import http.client
import json
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, machine, report
from benchmarks.systems import APIS, INFINITY, ROOT, Baseline, Before, Infinity, Peer, Raw, Service, System
from benchmarks.texts import Texts
from embedding_service.inference import source

LUA = ROOT / "benchmarks" / "load.lua"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Scenario:
    """A load: the kind of texts, how many per request, and the number of clients."""

    name: str
    title: str
    kind: str  # sentence, mix, or a number of tokens
    texts: int = 1
    clients: int = 1
    encoding: str = "float"
    # Makes turns longer in which few requests fit, since wrk drops unfinished ones.
    stretch: float = 1.0
    # Each client waits this long after an answer.
    pause_ms: int = 0
    # Four other clients send requests of 32 texts of 250 tokens meanwhile.
    beside_bulk: bool = False

    @property
    def raw_batch(self) -> int:
        """The raw engine's batch size: 1 for a single client with one text, else 32."""
        return 1 if self.texts == self.clients == 1 else 32


SCENARIOS = [
    Scenario("one", "one sentence, 1 client", "sentence", stretch=0.75),
    Scenario("paused", "one sentence, 1 client, pauses of 20 ms", "sentence", pause_ms=20),
    Scenario("one-8", "one sentence, 8 clients", "sentence", clients=8),
    Scenario("one-32", "one sentence, 32 clients", "sentence", clients=32),
    Scenario("one-64", "one sentence, 64 clients", "sentence", clients=64),
    Scenario("one-32-base64", "one sentence, 32 clients, base64", "sentence", 1, 32, "base64", 0.75),
    Scenario("32-4", "32 sentences, 4 clients", "sentence", texts=32, clients=4),
    Scenario("32-4-base64", "32 sentences, 4 clients, base64", "sentence", 32, 4, "base64", 0.75),
    Scenario("mix", "lengths mixed, 32 clients", "mix", clients=32, stretch=1.75),
    Scenario("64-tokens", "64 tokens, 32 clients", "64", clients=32, stretch=1.5),
    Scenario("256-tokens", "256 tokens, 8 clients", "256", clients=8, stretch=1.25),
    Scenario("2048", "2,048 sentences in one request", "sentence", texts=2048),
    Scenario(
        "beside-bulk",
        "one sentence, 4 clients, beside 4 that send 32 texts of 250 tokens",
        "sentence",
        clients=4,
        stretch=2,
        beside_bulk=True,
    ),
]
WARM_UP = Scenario("one-32", "warming up", "sentence", clients=32)
BULK = Scenario("bulk", "32 texts of 250 tokens, 4 clients", "250", texts=32, clients=4)


class Bench:
    """One run: the systems, the texts, and the turns."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self._seconds: float = arguments.seconds
        self._turns: int = arguments.alternations
        self._scratch = scratch
        self._model_folder = source.resolve(machine.model(), None).folder
        self._scenarios = [s for s in SCENARIOS if not arguments.only or s.name in arguments.only]
        self._device: str = arguments.device
        self._dtype: str = arguments.dtype
        self._wanted: list[str] = arguments.systems
        self._peer: tuple[str, str] = (arguments.peer, arguments.api)
        self._checkout: Path = arguments.checkout
        texts = Texts(self._model_folder)
        self._pools = {
            "sentence": texts.sentences(4096),
            "mix": texts.mix(1024),
            "64": texts.of_length(64, 256),
            "256": texts.of_length(256, 128),
            "250": texts.of_length(250, 256),
        }

    def measure(self) -> dict[str, Any]:
        """The content of the results file."""
        about = machine.describe()
        with self.started() as (raw, servers, ready):
            scenarios = [self._alternate(scenario, raw, servers) for scenario in self._scenarios]
            padding = None
            if raw and any(s.kind == "mix" for s in self._scenarios):
                padding = raw.ask(
                    "served_padding", texts=self._pools["mix"], clients=32, seconds=self._seconds
                )
        return {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": machine.commit(),
            "machine": about,
            "settings": {
                "seconds_a_turn": self._seconds,
                "turns": self._turns,
                "device": self._device,
                "dtype": self._dtype,
            },
            "backend": self._backend,
            "ready_seconds": ready,
            "padding_of_mix": padding,
            "scenarios": scenarios,
        }

    @contextlib.contextmanager
    def started(self) -> Iterator[tuple[Raw | None, list[System], dict[str, float]]]:
        """The systems, ready and warm, with the seconds that each took to be ready."""
        servers: list[System] = []
        ready: dict[str, float] = {}
        self._backend = ""
        with contextlib.ExitStack() as running:
            raw = Raw("auto", self._device, self._dtype) if Raw.name in self._wanted else None
            if raw:
                running.callback(raw.stop)
                self._backend = raw.wait_ready()
            for name in self._wanted:
                server = self._start(name)
                if server is not None:
                    running.callback(server.stop)
                    servers.append(server)
                    ready[server.name] = round(server.wait_ready(), 2)
                    print(f"{server.name} is ready after {ready[server.name]} s", flush=True)
            for server in servers:
                self.load(server, WARM_UP, 2)
            yield raw, servers, ready

    def _start(self, name: str) -> System | None:
        scratch, device = self._scratch, self._device
        match name:
            case Service.name:
                return Service(scratch, device, DTYPE=self._dtype)
            case Before.name:
                return Before(scratch, device, self._checkout.resolve(), DTYPE=self._dtype)
            case Baseline.name:
                return Baseline(scratch, device, self._model_folder)
            case Peer.name:
                return Peer(scratch, *self._peer)
            case Infinity.name if INFINITY.exists():
                return Infinity(scratch, device, self._model_folder)
            case Infinity.name:
                print("infinity is not installed; `make bench-infinity` does that", flush=True)
        return None

    def _alternate(self, scenario: Scenario, raw: Raw | None, servers: list[System]) -> dict[str, Any]:
        turns: dict[str, list[dict[str, float]]] = {}
        for _ in range(self._turns):
            seconds = max(1, round(self._seconds * scenario.stretch))  # wrk accepts only whole seconds
            if raw and not (scenario.pause_ms or scenario.beside_bulk):
                turns.setdefault("raw", []).append(self._raw(scenario, raw, seconds))
            for server in servers:
                if scenario.encoding in server.formats:
                    turns.setdefault(server.name, []).append(self.load(server, scenario, seconds))
        medians = {name: _median(results) for name, results in turns.items()}
        line = "  ".join(f"{name} {result['texts_per_second']:.1f}" for name, result in medians.items())
        print(f"{scenario.title}: {line} texts/s", flush=True)
        return {
            "name": scenario.name,
            "title": scenario.title,
            "texts_per_request": scenario.texts,
            "clients": scenario.clients,
            "systems": medians,
            "turns": {
                name: [round(result["texts_per_second"], 1) for result in results]
                for name, results in turns.items()
            },
        }

    def _raw(self, scenario: Scenario, raw: Raw, seconds: int) -> dict[str, float]:
        pool = self._pools[scenario.kind]
        pool = pool[:2048] if scenario.texts == 2048 else pool[:512]
        result: dict[str, float] = raw.ask("run", texts=pool, batch_size=scenario.raw_batch, seconds=seconds)
        return result

    def load(self, server: System, scenario: Scenario, seconds: int) -> dict[str, float]:
        """What a system did under a closed-loop load."""
        if scenario.texts >= 1000:
            return self._one_at_a_time(server, scenario, seconds)
        if scenario.beside_bulk:
            return self._beside_bulk(server, scenario, seconds)
        used, served = _children_seconds(), server.cpu_by_role()
        result = _result(self._wrk(server, scenario, seconds), server, scenario)
        used = _children_seconds() - used
        served = {role: seconds - served[role] for role, seconds in server.cpu_by_role().items()}
        requests = max(1, result["requests"])
        return {
            "texts_per_second": result["requests"] * scenario.texts / result["seconds"],
            "p50_ms": result["p50_ms"],
            "p99_ms": result["p99_ms"],
            "generator_share": used / (result["seconds"] * machine.cores()),
            "bytes_per_text": result["bytes"] / (requests * scenario.texts),
            **{f"{role}_us": seconds / requests * 1e6 for role, seconds in served.items()},
        }

    def _beside_bulk(self, server: System, scenario: Scenario, seconds: int) -> dict[str, float]:
        """From a load in Python, which waits for the last answers: a server may give only a few in a turn."""
        bulk = self._wrk(server, BULK, seconds + 1)
        time.sleep(1)
        seen = load.measure(server.url, self.bodies(server, scenario), scenario.clients, seconds, 1)
        # A server may refuse some of these while it is busy.
        beside = _result(bulk, server, BULK, may_fail=True)
        served = beside["requests"] - beside["errors"]
        return {
            "texts_per_second": (seen["requests"] - seen["errors"]) / seen["seconds"],
            "refused": seen["errors"],
            "p50_ms": seen["p50_ms"],
            "p99_ms": seen["p99_ms"],
            "generator_share": seen["generator_cores"] / machine.cores(),
            "bulk_texts_per_second": served * BULK.texts / beside["seconds"],
            "bulk_refused": beside["errors"],
        }

    def bodies(self, server: System, scenario: Scenario) -> Path:
        """A file with one request's body a line."""
        bodies = self._scratch / f"{scenario.name}-{server.name}.txt"
        if not bodies.exists():
            pool, size = self._pools[scenario.kind], scenario.texts
            requests = [pool[first : first + size] for first in range(0, len(pool), size)]
            bodies.write_bytes(b"\n".join(server.body(texts, scenario.encoding) for texts in requests))
        return bodies

    def _wrk(self, server: System, scenario: Scenario, seconds: int) -> "subprocess.Popen[str]":
        bodies = self.bodies(server, scenario)
        command = ["wrk", "-t1", f"-c{scenario.clients}", f"-d{seconds}s", "--timeout", "60s"]
        command += ["-s", str(LUA), server.url, "--", str(bodies), server.path]
        if scenario.pause_ms:
            command.append(str(scenario.pause_ms))
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _one_at_a_time(self, server: System, scenario: Scenario, seconds: int) -> dict[str, float]:
        """One client in Python, for requests that take seconds: wrk would drop the last one unfinished."""
        body = server.body(self._pools[scenario.kind][: scenario.texts], scenario.encoding)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        took: list[float] = []
        size = 0
        before = time.process_time()
        while sum(took) < seconds:
            began = time.perf_counter()
            connection.request("POST", server.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            took.append(time.perf_counter() - began)
            size += len(answer)
            if response.status != 200:
                raise SystemExit(f"{server.name} answered {response.status} in {scenario.title}")
        connection.close()
        texts = scenario.texts * len(took)
        return {
            "texts_per_second": texts / sum(took),
            "p50_ms": float(np.median(took)) * 1e3,
            "p99_ms": max(took) * 1e3,
            "generator_share": (time.process_time() - before) / (sum(took) * machine.cores()),
            "bytes_per_text": size / texts,
        }


def _result(
    running: "subprocess.Popen[str]", server: System, scenario: Scenario, may_fail: bool = False
) -> dict[str, float]:
    output = running.communicate()[0]
    if running.returncode:
        raise SystemExit(f"wrk failed: {output}")
    result: dict[str, float] = json.loads(output.rpartition("RESULT ")[2])
    if result["errors"] and not may_fail:
        raise SystemExit(f"{server.name} failed {result['errors']} requests in {scenario.title}")
    return result


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _median(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in results), 4) for key in results[0]}


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the systems that it asks for."""
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn")
    parser.add_argument("--alternations", type=int, default=3, help="turns of each system")
    parser.add_argument("--quick", action="store_true", help="one turn of 2 s each; write no results")
    parser.add_argument("--only", nargs="*", choices=names, help="these scenarios")
    parser.add_argument("--systems", nargs="*", choices=list(report.LABELS), help="these, and no others")
    parser.add_argument("--peer", metavar="COMMAND", help="another server: a command with {port}, or its URL")
    parser.add_argument("--api", choices=list(APIS), default="tei", help="the API of the peer")
    parser.add_argument("--checkout", type=Path, metavar="DIR", help="another version of the service")
    parser.add_argument("--device", default="cpu", help="DEVICE of all systems")
    parser.add_argument("--dtype", default="auto", help="DTYPE of the raw engine and the service")
    parser.add_argument("--label", help="name of the results files, by default the date and device")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed (Debian: apt-get install wrk)")
    if arguments.systems is None:
        arguments.systems = ["raw", "service", "baseline", "infinity"]
    arguments.systems += ["peer"] * bool(arguments.peer) + ["before"] * bool(arguments.checkout)
    if arguments.quick:
        arguments.seconds, arguments.alternations = 2.0, 1
    return arguments


def main() -> None:
    arguments = parsed(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    with tempfile.TemporaryDirectory() as scratch:
        results = Bench(arguments, Path(scratch)).measure()
    print(report.markdown(results), report.verdicts(results), sep="\n\n")
    if not arguments.quick:
        label = arguments.label or f"{results['date']}-{arguments.device.replace(':', '')}"
        report.write(results, RESULTS, label)


if __name__ == "__main__":
    main()
