"""The metrics under the names of Text Embeddings Inference, as far as this service counts the same."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.samples import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TYPES = {
    "te_queue_size": "gauge",
    "te_request_count": "counter",
    "te_request_success": "counter",
    "te_request_failure": "counter",
    "te_request_duration": "histogram",
    "te_request_tokenization_duration": "histogram",
    "te_request_queue_duration": "histogram",
    "te_request_inference_duration": "histogram",
    "te_embed_count": "counter",
    "te_embed_success": "counter",
    "te_batch_next_size": "histogram",
    "te_batch_next_tokens": "histogram",
}
HISTOGRAMS = {
    "embedding_batch_texts": "te_batch_next_size",
    "embedding_batch_tokens": "te_batch_next_tokens",
}
# The parts of each total.
SUMS = {
    "embedding_requests_waiting": ("te_queue_size",),
    "embedding_batch_texts_sum": ("te_embed_count", "te_embed_success"),
    "embedding_cache_hits_total": ("te_embed_count", "te_embed_success"),
    "embedding_failed_texts_total": ("te_embed_count",),
}


def exposition(families: Iterable[Metric], routes: Container[str]) -> bytes:
    """The text of a scrape; `routes` are those that embed."""
    totals: dict[str, dict[str, float]] = {name: defaultdict(float) for name in TYPES}
    for family in families:
        for sample in family.samples:
            for name, rest in _series(family.name, sample, routes):
                totals[name][rest] += sample.value
    lines = []
    for name, kind in TYPES.items():
        lines.append(f"# TYPE {name} {kind}")
        lines += [f"{name}{rest} {value}" for rest, value in totals[name].items()]
    return "\n".join([*lines, ""]).encode()


def _series(family: str, sample: Sample, routes: Container[str]) -> Iterator[tuple[str, str]]:
    """TEI's names for what a sample counts, each with what follows it: a suffix and a label."""
    labels = sample.labels
    rest = sample.name.removeprefix(family) + (f'{{le="{labels["le"]}"}}' if "le" in labels else "")
    if rest == "_created":
        return
    if family in HISTOGRAMS:
        yield HISTOGRAMS[family], rest
    elif family == "embedding_phase_duration_seconds":
        yield f"te_request_{labels['phase']}_duration", rest
    elif labels.get("route") in routes and labels["method"] == "POST":
        if family == "embedding_request_duration_seconds":
            yield "te_request_duration", rest
        else:
            yield "te_request_count", ""
            kind = _failure(int(labels["status"]))
            yield ("te_request_failure", f'{{err="{kind}"}}') if kind else ("te_request_success", "")
    for name in SUMS.get(sample.name, ()):
        yield name, ""


def _failure(status: int) -> str:
    """TEI's word for why a request failed; nothing if it did not."""
    if status < 400:
        return ""
    if status == 429:
        return "overloaded"
    return "inference" if status >= 500 or status == 424 else "validation"
