"""Measures how busy the model process keeps a simulated accelerator, so that no GPU is needed.

The device runs the batches of two streams one after the other. A batch costs the host a fixed launch time,
during which it holds the interpreter's lock, and costs the device a time in proportion to its tokens,
including padding; the stream waits for the result. The rest is real: the socket, the tokenizer, the queue,
packing and delivering. There is one client process for each web worker; a client sends its next request as
soon as it has a response.

python -m benchmarks.simulated_device --tokens-per-second 200000

With --devices, it measures instead how many requests the service answers with these numbers of devices, each
in a model process of its own. They have to be slow enough that the cores of this machine are not the limit.

python -m benchmarks.simulated_device --devices 1 4 --tokens-per-second 4000
"""

import argparse
import contextlib
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from benchmarks import load as load_generator
from benchmarks.systems import ROOT, Service
from benchmarks.texts import Texts
from embedding_service.engine import EmbedRequest, Vectors
from embedding_service.inference import local, source
from embedding_service.inference.budget import BatchBudget, BatchCost
from embedding_service.inference.loading import load
from embedding_service.inference.model import Model
from embedding_service.inference.preprocessing import Preprocessor
from embedding_service.inference.tokenized import Batch
from embedding_service.observability import metrics
from embedding_service.settings.config import Config
from embedding_service.sharing import server, wire

DIMENSION, BATCH_TOKENS = 384, 32 * 256
MADE = np.random.default_rng(1).standard_normal((16_384, DIMENSION)).astype(np.float32)


@dataclass
class Device:
    """Runs one batch at a time, regardless of the number of streams."""

    tokens_per_second: float
    launch_seconds: float
    batches: int = 0
    busy_seconds: float = 0.0
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, tokens: int) -> None:
        """Launch a batch and wait for its result."""
        launched = time.thread_time() + self.launch_seconds
        while time.thread_time() < launched:
            pass
        with self.lock:
            seconds = tokens / self.tokens_per_second
            self.free_at = max(self.free_at, time.monotonic()) + seconds
            self.batches += 1
            self.busy_seconds += seconds
            ends = self.free_at
        time.sleep(max(0.0, ends - time.monotonic()))


@dataclass(eq=False)
class Stream:
    """A stream, which packs its batches like a real one."""

    device: Device
    preprocessor: Preprocessor

    def forward(self, batch: Batch) -> Vectors:
        rows, width = self.preprocessor.pack(batch)["input_ids"].shape
        self.device.run(rows * width)
        return MADE[:rows]


def on_device(runtime: Model, device: Device, streams: int) -> Model:
    """Make the loaded model run on the device."""
    runtime.streams = [Stream(device, runtime.preprocessor) for _ in range(streams)]
    runtime.all_cores = None
    runtime.on_cpu, runtime.normalized = False, True
    runtime.info = msgspec.structs.replace(runtime.info, max_batch_tokens=BATCH_TOKENS)
    cost = BatchCost(device.launch_seconds, 1 / device.tokens_per_second)
    runtime.budget = BatchBudget(cost, max_seq_length=256, max_batch_tokens=BATCH_TOKENS)
    return runtime


def clients(sock: socket.socket, count: int, texts: int, sentences: list[str], first: int) -> None:
    """A web worker's side of the socket: keeps `count` requests in flight until it is closed."""
    channel = wire.Channel(sock)
    numbers = iter(range(10**9))

    def call(number: int) -> EmbedRequest:
        # The texts in flight differ, since identical texts are computed only once.
        own = [f"{first} {sentences[(number * texts + n) % len(sentences)]}" for n in range(texts)]
        return EmbedRequest(texts=own, deadline=time.monotonic() + 60)

    def send(count: int) -> None:
        chosen = [next(numbers) for _ in range(count)]
        channel.send(wire.Calls(chosen, [call(number) for number in chosen]))

    with contextlib.suppress(wire.Closed):
        send(count)
        while True:
            message = channel.receive()
            if isinstance(message, wire.Replies):
                send(len(message.answers))


@contextlib.contextmanager
def web_workers(
    engine: local.LocalEngine, workers: int, count: int, texts: int, sentences: list[str]
) -> Iterator[None]:
    """Start `workers` processes, which share `count` clients."""
    owner: Any = SimpleNamespace(engine=engine, forget=lambda _connection: None)
    ours, pids = [], []
    for worker in range(workers):
        here, there = socket.socketpair(socket.AF_UNIX)
        pid = os.fork()
        if not pid:
            here.close()
            clients(there, count // workers, texts, sentences, worker)
            os._exit(0)
        there.close()
        ours.append(here)
        pids.append(pid)
    # Start threads only after all forks.
    for sock in ours:
        server.Connection(sock, owner)
    try:
        yield
    finally:
        for sock in ours:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for pid in pids:
            os.waitpid(pid, 0)


def several(counts: list[int], tokens_per_second: float, seconds: float) -> None:
    """Measure the service on several devices: 64 clients, each request 8 texts of 64 tokens."""
    texts = Texts(source.resolve(source.DEFAULT_MODEL, None).folder).of_length(64, 1024)
    print("| devices | requests/s | times the first | p50 / p99 ms | errors | CPU of a core |")
    print("|---:|---:|---:|---:|---:|---:|")
    first = None
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            service = Service(
                Path(scratch),
                ",".join(["cpu"] * count),
                PYTHONPATH=str(ROOT / "benchmarks" / "simulated"),
                SIMULATED_TOKENS_PER_SECOND=str(tokens_per_second),
            )
            try:
                service.wait_ready()
                service.wait_all_ready()
                bodies = Path(scratch, "bodies.txt")
                requests = [texts[start : start + 8] for start in range(0, len(texts), 8)]
                bodies.write_bytes(b"\n".join(service.body(request, "base64") for request in requests))
                load_generator.measure(service.url, bodies, 64, seconds / 4, 1)
                before = sum(service.cpu_by_role().values())
                found = load_generator.measure(service.url, bodies, 64, seconds, 1)
                used = sum(service.cpu_by_role().values()) - before
            finally:
                service.stop()
        rate = found["requests"] / found["seconds"]
        first = first or rate
        print(
            f"| {count} | {rate:.1f} | {rate / first:.2f} | {found['p50_ms']:.0f} / {found['p99_ms']:.0f} "
            f"| {found['errors']:.0f} | {used / found['seconds']:.0%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens-per-second", type=float, default=200_000)
    parser.add_argument("--launch-ms", type=float, default=0.5)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument(
        "--devices", type=int, nargs="+", help="measure the service on these numbers of devices"
    )
    arguments = parser.parse_args()
    if arguments.devices:
        several(arguments.devices, arguments.tokens_per_second, arguments.seconds)
        return
    logging.basicConfig(level=logging.WARNING)
    metrics.share(Path(tempfile.mkdtemp()))
    sentences = Texts(source.resolve(source.DEFAULT_MODEL, None).folder).sentences(4096)
    print(
        "| clients | texts a request | web workers | device busy | texts/s | texts a batch | CPU of a core |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for count, texts, workers in ((64, 32, 1), (256, 1, 4)):
        device = Device(arguments.tokens_per_second, arguments.launch_ms / 1e3)

        def simulated(settings: Config, device: Device = device) -> Model:
            return on_device(load(settings), device, arguments.streams)

        settings = Config(
            embedding_model=source.DEFAULT_MODEL, device="cpu", backend="torch", cache_folder=""
        )
        engine = local.LocalEngine(settings, load=simulated)
        engine.loaded.wait()
        with web_workers(engine, workers, count, texts, sentences):
            time.sleep(1)
            before = (time.monotonic(), time.process_time(), device.busy_seconds, device.batches)
            served = metrics.BATCH_TEXTS._sum.get()
            time.sleep(arguments.seconds)
            after = (time.monotonic(), time.process_time(), device.busy_seconds, device.batches)
            served = metrics.BATCH_TEXTS._sum.get() - served
        seconds, cpu, busy, batches = (last - first for first, last in zip(before, after, strict=True))
        print(
            f"| {count} | {texts} | {workers} | {busy / seconds:.1%} | {served / seconds:.0f} "
            f"| {served / batches:.0f} | {cpu / seconds:.0%} |",
            flush=True,
        )
        engine.close()


if __name__ == "__main__":
    main()
