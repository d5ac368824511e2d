"""The raw engine: the model alone in one process, without HTTP and without a queue, as fast as possible.

It runs in two ways: the service's own runtime, called directly, and SentenceTransformer.encode. Both get all
texts at once, sorted by length, in batches of 32; with `batch_size` 1 they get them one at a time.

python -m benchmarks.raw_engine                 a table of lengths and batch sizes
python -m benchmarks.raw_engine --stdin         tasks as lines of JSON, for the harness
"""

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from benchmarks import machine
from benchmarks.texts import Texts
from embedding_service.engine import EmbedRequest, Outcome, Vectors
from embedding_service.inference import source
from embedding_service.inference.batcher import Batcher
from embedding_service.inference.loading import load
from embedding_service.inference.model import Model
from embedding_service.inference.runtime import Stream
from embedding_service.inference.tokenized import Batch, Rows
from embedding_service.settings.config import Config

Encode = Callable[[list[str]], Any]


@dataclass
class Rate:
    """How fast an engine was. The percentiles are of the time of a batch."""

    texts_per_second: float
    p50_ms: float
    p99_ms: float
    padding_share: float


class RawEngine:
    """One loaded model, called directly."""

    def __init__(self, backend: str, device: str, dtype: str = "auto") -> None:
        settings = Config(
            embedding_model=machine.model(),
            backend=backend,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,  # type: ignore[arg-type]
            cache_folder="",
        )
        # nncf writes to standard output, which we use for results.
        with contextlib.redirect_stdout(sys.stderr):
            self.model = load(settings)

    @cached_property
    def _oracle(self) -> Any:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(
            str(source.resolve(machine.model(), None).folder), device=self.model.info.device
        )

    @property
    def name(self) -> str:
        """The engine's name in results."""
        return self.model.info.backend

    def run(self, texts: list[str], batch_size: int, seconds: float) -> Rate:
        """Embed the texts repeatedly until the time is up.

        For half of the time, batches run one after the other on all cores; for the other half, they run
        side by side on one core each. The faster way counts.
        """
        batches = _batches(texts, batch_size)
        for batch in batches[:3]:
            self._embed(batch)
        padding = self._padding(batches)
        if batch_size == 1 or len(self.model.streams) == 1:
            return _time(self._embed, batches, seconds, padding)
        together = _time(self._embed, batches, seconds / 2, padding)
        apart = self._side_by_side(batches, seconds / 2, padding)
        return max(together, apart, key=lambda rate: rate.texts_per_second)

    def _side_by_side(self, batches: list[list[str]], seconds: float, padding: float) -> Rate:
        def run(number: int, stream: Stream) -> Rate:
            def embed(batch: list[str]) -> Vectors:
                return stream.forward(self._prepared(batch))

            return _time(embed, batches, seconds, padding, seed=number)

        with ThreadPoolExecutor(len(self.model.streams)) as threads:
            rates = list(threads.map(run, range(len(self.model.streams)), self.model.streams))
        return Rate(
            sum(rate.texts_per_second for rate in rates),
            max(rate.p50_ms for rate in rates),
            max(rate.p99_ms for rate in rates),
            padding,
        )

    def encode(self, texts: list[str], batch_size: int, seconds: float) -> Rate:
        """The same through SentenceTransformer.encode (the transformer in torch), batch by batch."""

        def embed(batch: list[str]) -> Any:
            return self._oracle.encode(
                batch, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
            )

        batches = _batches(texts, batch_size)
        for batch in batches[:3]:
            embed(batch)
        return _time(embed, batches, seconds, self._padding(batches))

    def served_padding(self, texts: list[str], clients: int, seconds: float) -> float:
        """The share of padding in the batches that the service forms from requests with one text."""
        recorder = _Recorder(self.model)
        batcher = Batcher(cast(Model, recorder), max_queued_tokens=10**9)
        stop = time.monotonic() + seconds
        turn = iter(range(10**9))

        def submit(_outcomes: Sequence[tuple[int, Outcome]] = ()) -> None:
            if time.monotonic() < stop:
                text = texts[next(turn) % len(texts)]
                batcher.submit([(0, EmbedRequest(texts=[text], deadline=stop + 60))], submit)

        for _ in range(clients):
            submit()
        while batcher.queued_tokens:
            time.sleep(0.01)
        batcher.close("done")
        return 1 - recorder.real / recorder.padded

    def _embed(self, batch: list[str]) -> Vectors:
        return (self.model.all_cores or self.model.streams[0]).forward(self._prepared(batch))

    def _prepared(self, batch: list[str]) -> Batch:
        return [Rows.all_of(self.model.preprocessor.prepare(batch, None, None))]

    def _padding(self, batches: list[list[str]]) -> float:
        real = padded = 0
        for batch in batches:
            lengths = self.model.preprocessor.prepare(batch, None, None).lengths
            real += int(lengths.sum())
            padded += int(lengths.max()) * len(lengths)
        return 1 - real / padded


class _Recorder:
    """A runtime that counts the tokens and the padding in its streams."""

    def __init__(self, runtime: Model) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self.streams = [_RecordedStream(stream, self.count) for stream in runtime.streams]
        self.all_cores = _RecordedStream(runtime.all_cores, self.count) if runtime.all_cores else None
        self.real = self.padded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def count(self, batch: Batch) -> None:
        lengths = np.concatenate([part.lengths for part in batch])
        with self._lock:
            self.real += int(lengths.sum())
            self.padded += int(lengths.max()) * len(lengths)


class _RecordedStream:
    """A stream whose batches are counted."""

    def __init__(self, stream: Stream, count: Callable[[Batch], None]) -> None:
        self._stream, self._count = stream, count

    def forward(self, batch: Batch) -> Vectors:
        self._count(batch)
        return self._stream.forward(batch)


def _batches(texts: list[str], batch_size: int) -> list[list[str]]:
    """Batches of texts sorted by length, as in encode(); with batch size 1, in the given order."""
    ordered = sorted(texts, key=len) if batch_size > 1 else texts
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]


def _time(embed: Encode, batches: list[list[str]], seconds: float, padding: float, seed: int = 1) -> Rate:
    """Embed all batches, in an order that mixes their lengths, again and again until the time is up."""
    order = np.random.default_rng(seed).permutation(len(batches))
    took: list[float] = []
    texts = 0
    began = now = time.perf_counter()
    while now - began < seconds:
        for position in order:
            embed(batches[position])
            texts += len(batches[position])
            ended = time.perf_counter()
            took.append(ended - now)
            now = ended
            if now - began > 1.5 * seconds or (len(batches[position]) == 1 and now - began > seconds):
                break
    p50, p99 = np.percentile(took, [50, 99]) * 1e3
    return Rate(texts / (now - began), float(p50), float(p99), padding)


def serve_tasks(engine: RawEngine) -> None:
    """Run tasks from standard input: {"do": name of a method, ...its arguments}."""
    print(json.dumps({"ready": engine.name}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        result = getattr(engine, task.pop("do"))(**task)
        print(json.dumps(asdict(result) if isinstance(result, Rate) else result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "openvino"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--stdin", action="store_true")
    arguments = parser.parse_args()
    engine = RawEngine(arguments.backend, arguments.device, arguments.dtype)
    if arguments.stdin:
        serve_tasks(engine)
        return
    texts = Texts(source.resolve(machine.model(), None).folder)
    pools = {"one sentence": texts.sentences(512), "mixed lengths": texts.mix(512)}
    pools |= {f"{length} tokens": texts.of_length(length, 128) for length in (64, 256)}
    print(
        f"{'texts':>14} {'batch':>5} {engine.name + ' texts/s':>20} {'ms/batch':>9} {'encode() texts/s':>17}"
    )
    for name, pool in pools.items():
        for batch_size in (1, 32):
            own = engine.run(pool, batch_size, arguments.seconds)
            plain = engine.encode(pool, batch_size, arguments.seconds)
            print(
                f"{name:>14} {batch_size:>5} {own.texts_per_second:>20.1f} {own.p50_ms:>9.2f} "
                f"{plain.texts_per_second:>17.1f}"
            )


if __name__ == "__main__":
    main()
