"""All metrics. Every process of the service counts, and any of them can report the totals."""

from collections.abc import Container, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.exposition import choose_encoder

from embedding_service import __version__
from embedding_service.observability import multiprocess, tei_metrics

# prometheus-client uses this class for the value of every metric.
values.ValueClass = multiprocess.SharedValue

# The metrics of this process, or of the whole service if no folder is shared.
registry = CollectorRegistry()
share = multiprocess.share


def _counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
    return Counter(f"embedding_{name}", text, labels, registry=registry)


def _gauge(name: str, text: str, mode: str, labels: Sequence[str] = ()) -> Gauge:
    return Gauge(f"embedding_{name}", text, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]


def _histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
    return Histogram(f"embedding_{name}", text, labels, registry=registry, buckets=buckets)


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

REQUESTS = _counter("requests", "Responses, by route rule, method and status.", ("route", "method", "status"))
REQUEST_SECONDS = _histogram(
    "request_duration_seconds",
    "Time from a request's headers to its response, by route rule and method.",
    _SECONDS,
    ("route", "method"),
)
PHASE_SECONDS = _histogram(
    "phase_duration_seconds",
    "Time of an embedding request by phase: tokenization, queue or inference.",
    _SECONDS,
    ("phase",),
)
TRUNCATED_TEXTS = _counter("truncated_texts", "Texts that were truncated to the model's maximum length.")
CHUNKS = _counter("chunks", "Pieces that over-long texts were embedded in (overflow: mean or chunks).")
FAILED_TEXTS = _counter("failed_texts", "Texts without a vector in requests with on_error: null.")

BATCH_TEXTS = _histogram("batch_texts", "Texts in a forward pass.", [2**n for n in range(11)])
BATCH_TOKENS = _histogram(
    "batch_tokens", "Tokens in a forward pass, without padding.", [2**n for n in range(3, 17)]
)
BATCH_SECONDS = _histogram("batch_duration_seconds", "Duration of a forward pass.", _SECONDS)
PADDING_TOKENS = _counter("padding_tokens", "Padding tokens in forward passes.")
QUEUED_TOKENS = _gauge(
    "queued_tokens", "Tokens accepted and not yet answered, sampled once a second.", "livesum"
)
REQUESTS_WAITING = _gauge(
    "requests_waiting", "Requests that wait for their first batch, sampled once a second.", "livesum"
)
REQUESTS_RUNNING = _gauge(
    "requests_running", "Requests whose first batch has begun, sampled once a second.", "livesum"
)
OUT_OF_MEMORY_HALVINGS = _counter(
    "out_of_memory_halvings",
    "Forward passes that did not fit in the device's memory and halved the batch size.",
)
NONFINITE_RECOMPUTATIONS = _counter(
    "nonfinite_recomputations", "Vectors that were not finite and were computed again in float32."
)

CACHE_HITS = _counter("cache_hits", "Texts whose vectors were in the cache (CACHE_MB).")
CACHE_MISSES = _counter("cache_misses", "Texts whose vectors were not in the cache.")

MODEL_RESTARTS = _counter("model_restarts", "Restarts of model processes.")
MODEL_READY = _gauge("model_ready", "Model processes that are ready to embed.", "livesum")
MODEL_INFO = _gauge(
    "model_info",
    "1 for the model that is loaded, described by the labels.",
    "livemax",
    ("model", "revision", "device", "dtype", "backend", "dimension", "max_seq_length", "fingerprint"),
)
_PROCESS = ("process", "device")
PROCESS_READY = _gauge(
    "process_ready", "1 for each model process that is ready, by its place in DEVICE.", "livemax", _PROCESS
)
PROCESS_TEXTS = _counter("process_texts", "Texts that each model process has embedded.", _PROCESS)
PROCESS_BATCH_SECONDS = _counter(
    "process_batch_seconds", "Duration of the forward passes of each model process.", _PROCESS
)
BUILD_INFO = _gauge("build_info", "1 for the version of the service.", "livemax", ("version",))

GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "Memory in use on the model's GPU.", "livemax", ("gpu",))
GPU_MEMORY_TOTAL = _gauge("gpu_memory_total_bytes", "Memory of the model's GPU.", "livemax", ("gpu",))
GPU_UTILIZATION = _gauge(
    "gpu_utilization_ratio",
    "Share of the last sampling period in which the GPU was busy, 0 to 1.",
    "livemax",
    ("gpu",),
)
GPU_TEMPERATURE = _gauge("gpu_temperature_celsius", "Temperature of the model's GPU.", "livemax", ("gpu",))

BUILD_INFO.labels(__version__).set(1)


# One label for all other methods keeps the number of series bounded.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Kept, since looking up labels costs as much as counting.
_phases = [PHASE_SECONDS.labels(phase) for phase in ("tokenization", "queue", "inference")]
_requests: dict[tuple[str, str, int], tuple[Any, Histogram]] = {}


def request_series(route: str, method: str, status: int) -> tuple[Any, Histogram]:
    """The series of these requests, at 0 if new."""
    labels = route, method if method in _METHODS else "other"
    series = REQUESTS.labels(*labels, str(status))._value, REQUEST_SECONDS.labels(*labels)
    if method in _METHODS:
        _requests[route, method, status] = series
    return series


def record_request(
    key: tuple[str, str, int], seconds: float, phase_ms: Sequence[float] = (), truncated_texts: int = 0
) -> None:
    """Count a request by route, method and status; if it embedded texts, with the times of its phases."""
    requests, durations = _requests.get(key) or request_series(*key)
    phases = [(phase, ms / 1e3) for phase, ms in zip(_phases, phase_ms, strict=False)]
    multiprocess.add([(requests, 1.0)], [(durations, seconds), *phases])
    if truncated_texts:
        TRUNCATED_TEXTS.inc(truncated_texts)


_padding: Any = PADDING_TOKENS._value
# The texts and seconds of this model process.
_process: list[Any] = []


def describe_process(place: int, device: str) -> Gauge:
    """Count batches by the place of this model process in DEVICE, too; returns the gauge of its readiness."""
    labels = (str(place), device)
    _process[:] = [PROCESS_TEXTS.labels(*labels)._value, PROCESS_BATCH_SECONDS.labels(*labels)._value]
    return PROCESS_READY.labels(*labels)


def record_batch(texts: int, tokens: int, padded_tokens: int, seconds: float) -> None:
    """Count a forward pass."""
    multiprocess.add(
        [(_padding, padded_tokens - tokens), *zip(_process, (texts, seconds), strict=False)],
        [(BATCH_TEXTS, texts), (BATCH_TOKENS, tokens), (BATCH_SECONDS, seconds)],
    )


def record_cache(hits: int, misses: int) -> None:
    """Count texts looked up in the cache of vectors."""
    if hits:
        CACHE_HITS.inc(hits)
    if misses:
        CACHE_MISSES.inc(misses)


def exposition(accept: str) -> tuple[bytes, str]:
    """The response to a scrape: the values of all processes, and the content type."""
    encode, content_type = choose_encoder(accept)
    return encode(_all_processes()), content_type


def tei_exposition(routes: Container[str]) -> tuple[bytes, str]:
    """The same with the names of Text Embeddings Inference; `routes` are those that embed."""
    return tei_metrics.exposition(_all_processes().collect(), routes), tei_metrics.CONTENT_TYPE


def _all_processes() -> CollectorRegistry:
    folder = multiprocess.shared_folder()
    if folder is None:
        return registry
    source = CollectorRegistry()
    source.register(multiprocess.AllProcesses(folder))
    return source
