"""Runs a batch in a stream: halves it if it fails, and computes vectors again that are not finite."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from embedding_service.engine import Vectors
from embedding_service.inference.model import Model
from embedding_service.inference.pending import Share, rows_of
from embedding_service.inference.runtime import DeviceLost, OutOfMemory, Stream
from embedding_service.observability import metrics

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Computed:
    """The vectors of a batch, of shape (rows, dimension), and when they were computed (monotonic clock).

    `failed` are the texts without a vector, and why: their rows are not finite.
    """

    shares: list[Share]
    vectors: Vectors
    tokens: int
    padded: int
    began: float
    ended: float
    failed: list[tuple[Share, str]] = field(default_factory=list)


def execute(
    shares: list[Share],
    model: Model,
    stream: Stream,
    *,
    on_start: Callable[[float], None],
    on_out_of_memory: Callable[[], None],
) -> list[Computed]:
    """Embed a batch. If it fails, halve it until only the faulty texts are left. Raises DeviceLost."""
    found: list[Computed] = []
    waiting = [shares]
    while waiting:
        batch = [share for share in waiting.pop() if not share[0].finished]
        if not batch:
            continue
        rows = rows_of(batch)
        lengths = rows[0].lengths if len(rows) == 1 else np.concatenate([part.lengths for part in rows])
        texts = len(lengths)
        failed: list[tuple[Share, str]] = []
        began = time.monotonic()
        on_start(began)
        try:
            vectors = stream.forward(rows)
            if len(vectors) != texts:
                raise RuntimeError(f"{len(vectors)} vectors came back for {texts} texts")
            ended = time.monotonic()
            if not np.isfinite(vectors).all():
                vectors = vectors.copy()
                failed = _recompute(batch, vectors, model)
        except DeviceLost:
            raise
        except Exception as error:
            if isinstance(error, OutOfMemory):
                metrics.OUT_OF_MEMORY_HALVINGS.inc()
                log.warning("Out of memory with %d texts; halving", texts)
                on_out_of_memory()
            if texts > 1:
                waiting += reversed(halves(batch, texts // 2))
                continue
            log.error("A text could not be embedded", exc_info=error)
            ended = time.monotonic()
            vectors = np.full((1, model.info.embedding_dimension), np.nan, np.float32)
            memory = isinstance(error, OutOfMemory)
            failed = [
                (batch[0], "does not fit in the device's memory" if memory else "could not be embedded")
            ]
        counts = lengths.tolist()
        found.append(Computed(batch, vectors, sum(counts), max(counts) * texts, began, ended, failed))
    return found


def halves(shares: Sequence[Share], at: int) -> tuple[list[Share], list[Share]]:
    """Split a batch in two, the first with `at` texts."""
    first: list[Share] = []
    second: list[Share] = []
    for pending, rows in shares:
        here = min(max(at, 0), len(rows))
        at -= len(rows)
        if here:
            first.append((pending, rows[:here]))
        if here < len(rows):
            second.append((pending, rows[here:]))
    return first, second


def _recompute(shares: list[Share], vectors: Vectors, model: Model) -> list[tuple[Share, str]]:
    """Replace each non-finite vector, in place, by one computed alone in float32; returns the others."""
    failed = []
    texts = [(pending, rows[at : at + 1]) for pending, rows in shares for at in range(len(rows))]
    for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
        metrics.NONFINITE_RECOMPUTATIONS.inc()
        log.warning("A vector was not finite; computing it again in float32")
        (one,) = rows_of([texts[row]])
        try:
            vectors[row] = model.exact.forward(one)[0]
        except DeviceLost:
            raise
        except Exception:
            log.exception("Computing a vector again failed")
        if not np.isfinite(vectors[row]).all():
            vectors[row] = np.nan
            failed.append((texts[row], "has a vector that is not finite"))
    return failed
