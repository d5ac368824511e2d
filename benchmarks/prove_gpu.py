"""Tests and measures what needs a GPU, in one run of at most nine minutes: `bundle/prove-gpu.sh OUTPUT`.

Each step is a process of its own with a time limit, so that it cannot disturb or delay the next one. Its
findings are written to OUTPUT/results.json immediately, next to log.txt and, at the end, plot.svg.
"""

import argparse
import base64
import contextlib
import http.client
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, machine
from benchmarks.run import Scenario
from benchmarks.systems import ROOT, Baseline, Raw, Service, System
from benchmarks.texts import Texts
from embedding_service.inference import source

MAX_SECONDS = 530.0
# A dry run has to complete every step, even on a slow CPU.
MAX_DRY_SECONDS = 3000.0

# How long a raw engine runs before it is measured: its CUDA graphs are recorded meanwhile.
RECORDING_SECONDS = 4.0

# The settings of each number format. float32 is TF32 unless it is disabled.
FORMATS = {
    "float32": {"DTYPE": "float32", "NVIDIA_TF32_OVERRIDE": "0"},
    "TF32": {"DTYPE": "float32"},
    "float16": {"DTYPE": "float16"},
    "bfloat16": {"DTYPE": "bfloat16"},
}


class Step:
    """What the steps share: the time and device to measure with, the texts, and reporting."""

    def __init__(self, dry: bool, scratch: Path) -> None:
        self.dry = dry
        self.scratch = scratch
        self.device = "cpu" if dry else "cuda"
        self.seconds = 0.5 if dry else 1.5
        self.many = 64 if dry else 4096
        self.model_folder = source.resolve(machine.model(), None).folder
        texts = Texts(self.model_folder)
        self.pools = {
            "sentence": texts.sentences(4096),
            "mix": texts.mix(64 if dry else 512),
            **{str(n): texts.of_length(n, 16 if dry else 512) for n in (32, 64, 128, 256)},
        }

    def tell(self, name: str, value: Any) -> None:
        """Report a finding to the process that collects them."""
        print(json.dumps({name: value}), flush=True)

    def repeated(self, processes: int) -> str:
        """DEVICE for several model processes on one device."""
        return ",".join(["cpu" if self.dry else "cuda:0"] * processes)

    @contextlib.contextmanager
    def service(self, **settings: str) -> Iterator[Service]:
        """A ready service."""
        given = {"DEVICE": self.device, "CPU_FALLBACK": "false"} | settings
        running = Service(self.scratch, self.device, ROOT, **given)
        try:
            running.wait_ready()
            yield running
        finally:
            running.stop()

    def scenarios(self) -> list[Scenario]:
        """The loads of the service and of plain Flask."""
        return [
            Scenario("one", "one sentence, 1 client", "sentence"),
            Scenario("one-32", "one sentence, 32 clients", "sentence", clients=32),
            Scenario("one-256", "one sentence, 256 clients", "sentence", clients=256),
            Scenario("one-32-base64", "one sentence, 32 clients, base64", "sentence", 1, 32, "base64"),
            Scenario("32", "32 sentences, 1 client", "sentence", 32),
            Scenario("32-8", "32 sentences, 8 clients", "sentence", 32, 8),
            Scenario("32-64-base64", "32 sentences, 64 clients, base64", "sentence", 32, 64, "base64"),
            Scenario("64-tokens", "64 tokens, 32 clients", "64", clients=32),
            Scenario("256-tokens", "256 tokens, 32 clients", "256", clients=32),
            Scenario("many", f"{self.many} sentences in one request", "sentence", self.many),
            Scenario("many-base64", f"{self.many} sentences, base64", "sentence", self.many, 1, "base64"),
        ]

    def measure(self, server: System, scenario: Scenario, seconds: float | None = None) -> dict[str, Any]:
        """Run a load; returns its results and how busy the device was."""
        pool, size = self.pools[scenario.kind], scenario.texts
        bodies = self.scratch / f"{scenario.name}-{server.name}.txt"
        if not bodies.exists():
            requests = [pool[first : first + size] for first in range(0, len(pool), size)]
            bodies.write_bytes(b"\n".join(server.body(texts, scenario.encoding) for texts in requests))
        # Half of the cores, so that the generator leaves enough for the service.
        processes = max(1, machine.cores() // 2)
        with Gpu(self.dry) as gpu:
            result: dict[str, Any] = load.measure(
                server.url, bodies, scenario.clients, seconds or self.seconds, processes
            )
        result["texts_per_second"] = result["requests"] * scenario.texts / result["seconds"]
        result |= gpu.seen()
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}


class Gpu:
    """Samples the device through NVML while a load runs, except in a dry run."""

    def __init__(self, dry: bool) -> None:
        self._stop = threading.Event()
        self._busy: list[int] = []
        self._memory: list[int] = []
        self._thread = None if dry else threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Gpu":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def seen(self) -> dict[str, float]:
        """The median share of time in which a kernel ran, and the peak memory use in MiB."""
        if not self._busy:
            return {}
        return {
            "device_busy": statistics.median(self._busy) / 100,
            "device_memory_mib": max(self._memory) / 2**20,
        }

    def _watch(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        # The first device that CUDA may use, by NVML's index, which is right on systems with one GPU.
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._stop.wait(0.1):
            self._busy.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            self._memory.append(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def ask(server: System, texts: list[str], timeout: float = 60) -> tuple[int, np.ndarray | None]:
    """Send a request; returns its status and vectors."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        connection.request("POST", server.path, server.body(texts, "base64"))
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        return response.status, None
    vectors = [base64.b64decode(one) for one in json.loads(answer)["embeddings"]]
    return 200, np.array([np.frombuffer(vector, "<f4") for vector in vectors])


def reference(step: Step, texts: list[str]) -> np.ndarray:
    """The vectors of sentence-transformers in float32 on the CPU."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(step.model_folder), device="cpu", model_kwargs={"dtype": "float32"})
    vectors: np.ndarray = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    return vectors


def distance(got: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far vectors of length 1 are from the expected ones."""
    cosines = (got * expected).sum(axis=1)
    return {
        "mean_cosine": float(cosines.mean()),
        "lowest_cosine": float(cosines.min()),
        "largest_difference": float(np.abs(got - expected).max()),
    }


# The steps


def describe(step: Step) -> None:
    from bundle import found

    step.tell("found", found.describe())
    step.tell("machine", machine.describe())
    step.tell("commit", machine.commit())


def tests(step: Step) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings="]
    done = subprocess.run(
        [*command, "-rs", "tests/inference"],
        check=False,
        cwd=ROOT,
        env=os.environ | {"TEST_MODEL": machine.model()},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr, file=sys.stderr)
    step.tell("exit_code", done.returncode)
    step.tell("summary", done.stdout.strip().rpartition("\n")[2])
    done.check_returncode()


def vectors(step: Step) -> None:
    texts = step.pools["mix"]
    expected = reference(step, texts)
    for name, settings in FORMATS.items():
        with step.service(**settings) as service:
            status, got = ask(service, texts)
        assert got is not None, f"{name}: {status}"
        step.tell(name, distance(got, expected))


def engine(step: Step) -> None:
    batches = (1, 32) if step.dry else (1, 32, 256)
    loads = [(kind, batch) for kind in ("32", "sentence", "64", "256") for batch in batches]
    _run_engine(step, loads, encode=True)


def _run_engine(step: Step, loads: list[tuple[str, int]], *, encode: bool = False) -> None:
    """Measure the model without the service, in batches of texts of one kind."""
    raw = Raw("auto", step.device, "auto")
    try:
        step.tell("backend", raw.wait_ready())
        for kind, batch in loads:
            texts = step.pools[kind][: max(batch, 512)]
            if not step.dry and (kind, batch) == loads[0]:
                raw.ask("run", texts=texts, batch_size=batch, seconds=RECORDING_SECONDS)
            rate = raw.ask("run", texts=texts, batch_size=batch, seconds=step.seconds / 2)
            step.tell(f"{kind}, batches of {batch}", rate)
        if encode:
            texts = step.pools["sentence"][:512]
            rate = raw.ask("encode", texts=texts, batch_size=32, seconds=step.seconds / 2)
            step.tell("encode(), sentence, batches of 32", rate)
    finally:
        raw.stop()


def _serve(step: Step, server: System, only: tuple[str, ...] = ()) -> None:
    """Run every load that the server supports, or only some, after a warm-up."""
    scenarios = [
        scenario
        for scenario in step.scenarios()
        if scenario.encoding in server.formats and (not only or scenario.name in only)
    ]
    step.measure(server, step.scenarios()[1], 2 * step.seconds)
    for scenario in scenarios:
        step.tell(scenario.title, step.measure(server, scenario))


def service(step: Step, workers: int, processes: int = 1, only: tuple[str, ...] = ()) -> None:
    with step.service(WEB_CONCURRENCY=str(workers), DEVICE=step.repeated(processes)) as running:
        if processes > 1:
            running.wait_all_ready()
        _serve(step, running, only)


def other_model(step: Step, name: str) -> None:
    """A larger model: its engine, and the service with one and two processes on the device."""
    from benchmarks import random_models

    # The step is a process of its own, and what it starts measures this model.
    folder = random_models.build(name, step.scratch, step.model_folder, step.device, tiny=step.dry)
    os.environ["EMBEDDING_MODEL"] = str(folder)
    _run_engine(step, [("32", 1), ("128", 8), ("128", 32)])
    scenario = Scenario(
        "128", "32 texts of 128 tokens, 64 clients, base64", "128", 8 if step.dry else 32, 64, "base64"
    )
    for processes in (1, 2):
        device = step.repeated(processes)
        with step.service(WEB_CONCURRENCY="4", EMBEDDING_MODEL=str(folder), DEVICE=device) as running:
            running.wait_all_ready()
            step.measure(running, scenario, 2 * step.seconds)
            step.tell(f"{scenario.title}, processes: {processes}", step.measure(running, scenario))


def flask(step: Step) -> None:
    baseline = Baseline(step.scratch, step.device, step.model_folder)
    try:
        baseline.wait_ready()
        _serve(step, baseline)
    finally:
        baseline.stop()


def memory(step: Step) -> None:
    for size in (16, 32) if step.dry else (16, 64, 512, 128, 256):
        scenario = Scenario(f"memory-{size}", "", "256", texts=min(size, len(step.pools["256"])))
        with step.service(BATCH_SIZE=str(size)) as running:
            step.tell(f"BATCH_SIZE={size}", step.measure(running, scenario))


def out_of_memory(step: Step) -> None:
    """Fill most of the memory, so that a batch does not fit: it must be halved, and the request answered."""
    texts = step.pools["256"][:64]
    expected = reference(step, texts)
    taken = None
    if not step.dry:
        import torch

        left = 2 << 30
        taken = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
        step.tell("memory_left_mib", left >> 20)
    with step.service(BATCH_SIZE="32" if step.dry else "4096") as running:
        status, got = ask(running, texts)
        step.tell("status", status)
        if got is not None:
            step.tell("vectors", distance(got, expected))
        step.tell("info", _get(running, "/info"))
    step.tell("log", [line for line in running.log().splitlines() if "memory" in line])
    del taken


def lost_device(step: Step) -> None:
    """Cause an illegal access in the model process: no vector may be wrong, and the service must recover."""
    sign = step.scratch / "lose"
    texts = step.pools["sentence"][:4]
    folder = str(ROOT / "benchmarks" / "lost_device")
    with step.service(PYTHONPATH=folder, LOSE_DEVICE=str(sign)) as running:
        _, expected = ask(running, texts)
        assert expected is not None
        sign.touch()
        began = time.monotonic()
        statuses: dict[int, int] = {}
        lost = back = None
        wrong = 0
        most = 300 if step.dry else 25
        while back is None and time.monotonic() - began < most:
            status, got = ask(running, texts)
            statuses[status] = statuses.get(status, 0) + 1
            if got is None:
                lost = lost or time.monotonic() - began
            else:
                wrong += int(np.abs(got - expected).max() > 1e-3)
                back = time.monotonic() - began if lost else None
            time.sleep(0.01)
        step.tell("statuses", statuses)
        step.tell("wrong_vectors", wrong)
        step.tell("lost_after_seconds", lost)
        step.tell("back_after_seconds", back)
        step.tell("health", _get(running, "/health"))
    step.tell("log", running.log().splitlines()[-20:])
    if lost is None or back is None or wrong:
        sys.exit(f"lost after {lost} s, back after {back} s, {wrong} wrong vectors")


def soak(step: Step) -> None:
    """Run mixed lengths from 64 clients, in slices."""
    slices, seconds = (3, 1.0) if step.dry else (4, 10.0)
    scenario = Scenario("soak", "", "mix", clients=64)
    with step.service(WEB_CONCURRENCY="2") as running:
        step.measure(running, scenario, seconds / 2)
        for number in range(slices):
            result = step.measure(running, scenario, seconds)
            step.tell(f"{(number + 1) * seconds:.0f} s", result | {"host_memory_mib": running.memory_mib()})
        step.tell("health", _get(running, "/health"))


def _get(server: System, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


# The loads that show what more web workers or processes gain.
SHORT = ("one", "one-256", "32-64-base64", "many-base64")

# Each step with its time limit in seconds, the most important first, since the last may run out of time.
STEPS: dict[str, tuple[Callable[[Step], None], float]] = {
    "machine": (describe, 30),
    "tests": (tests, 75),
    "engine": (engine, 40),
    "service, 1 web worker": (lambda step: service(step, 1), 55),
    "service, 4 web workers": (lambda step: service(step, 4), 55),
    "service, 4 web workers, 2 processes": (lambda step: service(step, 4, 2, SHORT), 45),
    "bge-base": (lambda step: other_model(step, "bge-base"), 60),
    "lost device": (lost_device, 45),
    "service, 8 web workers": (lambda step: service(step, 8, 1, SHORT), 35),
    "Qwen3-0.6B": (lambda step: other_model(step, "Qwen3-0.6B"), 75),
    "vectors": (vectors, 70),
    "out of memory": (out_of_memory, 45),
    "soak": (soak, 65),
    "memory": (memory, 75),
    "plain Flask": (flask, 45),
    "service, 2 web workers": (lambda step: service(step, 2, 1, SHORT), 35),
}


# Running them


class Results:
    """results.json, rewritten after every finding, so that an interrupted run keeps its findings."""

    def __init__(self, folder: Path, dry: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "results.json"
        self.content: dict[str, Any] = {"dry_run": dry, "steps": {}}

    def add(self, step: str, finding: dict[str, Any]) -> None:
        self.content["steps"].setdefault(step, {}).update(finding)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self._path)


def run_step(name: str, seconds: float, results: Results, log: Path, dry: bool) -> None:
    """Run a step in its own process group, which is killed if the step exceeds its time limit."""
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.prove_gpu", "--step", name]
    with log.open("a") as errors:
        errors.write(f"\n== {name}\n")
        errors.flush()
        process = subprocess.Popen(
            command + ["--dry-run"] * dry,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout
    # SIGTERM lets the step stop its services, which run in sessions of their own.
    ending = threading.Timer(seconds, process.terminate)
    killing = threading.Timer(seconds + 15, os.killpg, [process.pid, signal.SIGKILL])
    for timer in (ending, killing):
        timer.daemon = True
        timer.start()
    for line in process.stdout:
        with contextlib.suppress(json.JSONDecodeError):
            results.add(name, json.loads(line))
    code = process.wait()
    took = time.monotonic() - began
    for timer in (ending, killing):
        timer.cancel()
    ended = "done" if code == 0 else f"cut after {seconds:.0f} s" if took >= seconds else f"failed ({code})"
    results.add(name, {"ended": ended, "took_seconds": round(took, 1)})
    print(f"{name}: {ended}, {took:.1f} s", flush=True)


def perform(name: str, dry: bool) -> None:
    """Run a step in this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as scratch:
        STEPS[name][0](Step(dry, Path(scratch)))


def verdicts(steps: dict[str, Any]) -> Iterator[str]:
    """Each target with the measured figure, if there is one."""

    def figure(step: str, title: str, key: str) -> float:
        value = steps.get(step, {}).get(title, {}).get(key)
        return float("nan") if value is None else float(value)

    one, many = "service, 1 web worker", "32 sentences, 64 clients, base64"
    large = "32 texts of 128 tokens, 64 clients, base64, processes: 1"
    bars = [
        ("one sentence alone, p50 in ms", figure(one, "one sentence, 1 client", "p50_ms"), "<=", 1.2),
        ("engine, 1 × 32 tokens, ms", figure("engine", "32, batches of 1", "p50_ms"), "<=", 0.35),
        ("bge-base, 1 × 32 tokens, ms", figure("bge-base", "32, batches of 1", "p50_ms"), "<=", 0.55),
        # Batches may run on both streams at once, so not the median of one.
        (
            "bge-base, 32 × 128 tokens, ms",
            32_000 / figure("bge-base", "128, batches of 32", "texts_per_second"),
            "<=",
            2.0,
        ),
        ("bge-base, device busy", figure("bge-base", large, "device_busy"), ">=", 0.8),
        *(
            (f"{title}, {step}", figure(step, load, "texts_per_second"), ">=", bar)
            for title, step, load, bar in (
                ("texts/s", "service, 4 web workers", many, 100_000),
                ("texts/s", "service, 4 web workers, 2 processes", many, 100_000),
                ("requests/s", "service, 8 web workers", "one sentence, 256 clients", 20_000),
            )
        ),
    ]
    for title, value, relation, bar in bars:
        if math.isnan(value):
            yield f"not measured  {title}"
            continue
        reached = value <= bar if relation == "<=" else value >= bar
        yield f"{'reached' if reached else 'NOT REACHED':>12}  {title}: {value:.2f}, bar {bar}"


def plot(steps: dict[str, Any], path: Path) -> None:
    """Plot texts per second by number of web workers, next to plain Flask."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    mpl.use("svg")
    from matplotlib import pyplot

    servers = [name for name in ("plain Flask", *sorted(steps)) if name in steps and "Flask" in name]
    servers += sorted(name for name in steps if name.startswith("service"))
    titles = [t for t, found in steps[servers[-1]].items() if isinstance(found, dict)] if servers else []
    figure, axes = pyplot.subplots(figsize=(9, 0.7 * len(titles) + 1.2))
    height = 0.8 / max(1, len(servers))
    for offset, server in enumerate(servers):
        rates = [steps[server].get(title, {}).get("texts_per_second", 0) for title in titles]
        places = [place + (offset - (len(servers) - 1) / 2) * height for place in range(len(titles))]
        bars = axes.barh(places, rates, height, label=server)
        axes.bar_label(bars, [f"{rate:.0f}" if rate else "" for rate in rates], padding=2, fontsize=6)
    axes.set_yticks(range(len(titles)), titles, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("texts per second", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "build" / "gpu")
    parser.add_argument("--dry-run", action="store_true", help="run a short form of every step on the CPU")
    parser.add_argument("--only", nargs="*", choices=list(STEPS), help="run only these steps")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        perform(arguments.step, arguments.dry_run)
        return
    began = time.monotonic()
    results = Results(arguments.output, arguments.dry_run)
    log = arguments.output / "log.txt"
    log.unlink(missing_ok=True)
    for name in arguments.only or STEPS:
        most = MAX_DRY_SECONDS if arguments.dry_run else MAX_SECONDS
        left = most - (time.monotonic() - began)
        if left > 20:
            limit = left - 15 if arguments.dry_run else min(STEPS[name][1], left - 15)
            run_step(name, limit, results, log, arguments.dry_run)
        else:
            results.add(name, {"ended": "no time was left"})
    steps = results.content["steps"]
    results.content["took_seconds"] = round(time.monotonic() - began, 1)
    results.add("verdicts", {"lines": list(verdicts(steps))})
    plot(steps, arguments.output / "plot.svg")
    print(*steps["verdicts"]["lines"], sep="\n")
    print(f"{results.content['took_seconds']} s; {arguments.output}")
    if any(step.get("ended", "done") != "done" for step in steps.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
