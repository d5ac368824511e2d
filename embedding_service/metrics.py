"""Every metric, by name; counted by all processes of the service and read from any of them.

Where PROMETHEUS_MULTIPROC_DIR names a folder, prometheus-client keeps the values in files there. Each
process takes the lowest free slot of the folder and locks it for its life; the files are named for
slots, not for process ids, so whoever comes after a dead process counts on where it stopped: counters
outlive their processes, the folder does not grow, and gauges of unlocked slots are left out.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from embedding_service import __version__

# Not a setting but prometheus-client's own protocol; config.py names the folder for a gunicorn master.
_FOLDER = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # noqa: TID251


class Slot:
    """The number under which this process counts, taken when first asked for and anew after a fork."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number: str | None = None
        self._lock: int | None = None
        os.register_at_fork(after_in_child=self._forget)

    def __call__(self) -> str:
        return self._number or self._take()

    def _take(self) -> str:
        for number in map(str, count()):
            lock = os.open(_lock_path(self._folder, number), os.O_RDWR | os.O_CREAT, 0o600)
            if _locked_by_another(lock, exclusively=True):
                os.close(lock)
                continue
            for stale in self._folder.glob(f"gauge_*_{number}.db"):
                stale.unlink()
            self._lock, self._number = lock, number
            return number
        raise AssertionError("count() does not end")

    def _forget(self) -> None:
        # The lock belongs to the parent, and must not outlive it in a child that holds it open.
        if self._lock is not None:
            os.close(self._lock)
        self._lock = self._number = None


class _AllProcesses:
    """The values of all processes, dead ones included but for their gauges."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        merged: Iterable[Metric] = MultiProcessCollector.merge(self._files())  # type: ignore[no-untyped-call]
        return sorted(merged, key=lambda metric: metric.name)

    def _files(self) -> list[str]:
        living: dict[str, bool] = {}
        files = []
        for path in self._folder.glob("*.db"):
            kind, _, number = path.stem.rpartition("_")
            if kind.startswith("gauge") and not living.setdefault(number, self._lives(number)):
                continue
            # A file is empty for the moment in which its process makes it.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size:
                    files.append(str(path))
        return files

    def _lives(self, number: str) -> bool:
        with _lock_path(self._folder, number).open() as lock:
            return _locked_by_another(lock.fileno(), exclusively=False)


def _lock_path(folder: Path, number: str) -> Path:
    return folder / f"{number}.lock"


def _locked_by_another(file: int, exclusively: bool) -> bool:
    """Whether the lock is held elsewhere; else it is ours until the file is closed."""
    import fcntl  # not on Windows, where no folder is named

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


if _FOLDER:
    values.ValueClass = values.MultiProcessValue(Slot(Path(_FOLDER)))  # type: ignore[no-untyped-call]

# What this process counts; without a folder that is everything there is.
registry = CollectorRegistry()


def _counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
    return Counter(f"embedding_{name}", text, labels, registry=registry)


def _gauge(name: str, text: str, mode: str, labels: Sequence[str] = ()) -> Gauge:
    return Gauge(f"embedding_{name}", text, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]


def _histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
    return Histogram(f"embedding_{name}", text, labels, registry=registry, buckets=buckets)


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

REQUESTS = _counter(
    "requests", "Requests answered, by route rule, method and status.", ("route", "method", "status")
)
REQUEST_SECONDS = _histogram(
    "request_duration_seconds",
    "From a request's headers to its answer, by route rule and method.",
    _SECONDS,
    ("route", "method"),
)
PHASE_SECONDS = _histogram(
    "phase_duration_seconds",
    "Where the time of an embedding request went: tokenization, queue or inference.",
    _SECONDS,
    ("phase",),
)
TRUNCATED_TEXTS = _counter(
    "truncated_texts", "Texts embedded without their end, being over the model's length."
)

BATCH_TEXTS = _histogram("batch_texts", "Texts in a forward pass.", [2**n for n in range(11)])
BATCH_TOKENS = _histogram(
    "batch_tokens", "Tokens in a forward pass, without padding.", [2**n for n in range(3, 17)]
)
BATCH_SECONDS = _histogram("batch_duration_seconds", "Duration of a forward pass.", _SECONDS)
PADDING_TOKENS = _counter("padding_tokens", "Tokens of padding in forward passes, computed for nothing.")
QUEUED_TOKENS = _gauge(
    "queued_tokens", "Tokens accepted and not yet answered, at the last second.", "livesum"
)
OUT_OF_MEMORY_HALVINGS = _counter(
    "out_of_memory_halvings", "Forward passes that did not fit in the device's memory, and halved what may."
)
NONFINITE_RECOMPUTATIONS = _counter(
    "nonfinite_recomputations", "Vectors that were not finite and were computed again in float32."
)

MODEL_RESTARTS = _counter("model_restarts", "Model processes started again after one has ended.")
MODEL_READY = _gauge("model_ready", "Model processes that are ready to embed.", "livesum")
MODEL_INFO = _gauge(
    "model_info",
    "1 for the model that is loaded, described by the labels.",
    "livemax",
    ("model", "revision", "device", "dtype", "backend", "dimension", "max_seq_length", "fingerprint"),
)
BUILD_INFO = _gauge("build_info", "1 for the version of the service.", "livemax", ("version",))

GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "Memory in use on the model's GPU.", "livemax", ("gpu",))
GPU_MEMORY_TOTAL = _gauge("gpu_memory_total_bytes", "Memory of the model's GPU.", "livemax", ("gpu",))
GPU_UTILIZATION = _gauge(
    "gpu_utilization_ratio",
    "Share of the last moments in which the GPU computed, 0 to 1.",
    "livemax",
    ("gpu",),
)
GPU_TEMPERATURE = _gauge("gpu_temperature_celsius", "Temperature of the model's GPU.", "livemax", ("gpu",))

BUILD_INFO.labels(__version__).set(1)
# The children, since finding one by its labels costs as much as counting.
_tokenization, _queue, _inference = map(PHASE_SECONDS.labels, ("tokenization", "queue", "inference"))


def record_embedding(
    tokenization_ms: float, queue_ms: float, inference_ms: float, truncated_texts: int
) -> None:
    """Count an answered embedding request, in the process that answers it."""
    _tokenization.observe(tokenization_ms / 1e3)
    _queue.observe(queue_ms / 1e3)
    _inference.observe(inference_ms / 1e3)
    if truncated_texts:
        TRUNCATED_TEXTS.inc(truncated_texts)


def record_batch(lengths: Sequence[int], seconds: float) -> None:
    """Count a forward pass over texts of these lengths in tokens."""
    tokens = sum(lengths)
    BATCH_TEXTS.observe(len(lengths))
    BATCH_TOKENS.observe(tokens)
    BATCH_SECONDS.observe(seconds)
    PADDING_TOKENS.inc(len(lengths) * max(lengths) - tokens)


def exposition(accept: str) -> tuple[bytes, str]:
    """What a scrape gets: the values of all processes, and the content type of their form."""
    source = registry
    if _FOLDER:
        source = CollectorRegistry()
        source.register(_AllProcesses(Path(_FOLDER)))
    encode, content_type = choose_encoder(accept)
    return encode(source), content_type
