"""Runs a batch in a lane: halves it if it fails, and computes vectors again that are not finite."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from embedding_service.engine import Vectors
from embedding_service.inference.job import Part, halves, merged
from embedding_service.inference.model import Model
from embedding_service.inference.runtime import DeviceLost, Lane, OutOfMemory
from embedding_service.inference.tokenized import Rows
from embedding_service.observability import metrics

log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True, eq=False)
class Computed:
    """The vectors of a batch, of shape (rows, dimension), and when they were computed (monotonic clock)."""

    batch: list[Part]
    slices: list[Rows]
    vectors: Vectors
    began: float
    ended: float


@dataclass(slots=True, frozen=True, eq=False)
class Failed:
    """The part of one text that could not be embedded, and why. If a vector follows for it, ignore it."""

    part: Part
    why: str


def execute(
    parts: list[Part],
    model: Model,
    lane: Lane,
    *,
    on_start: Callable[[float], None],
    on_out_of_memory: Callable[[], None],
) -> Iterator[Computed | Failed]:
    """Embed a batch. If it fails, halve it until only the faulty texts are left. Raises DeviceLost."""
    waiting = [parts]
    while waiting:
        # A text that another request shares is computed even if the request that queued it is gone.
        batch = [part for part in waiting.pop() if not part.job.finished or part.job.shares]
        if not batch:
            continue
        texts = sum([len(part.rows) for part in batch])
        slices = merged(batch)
        began = time.monotonic()
        on_start(began)
        try:
            vectors = lane.forward(slices)
            if len(vectors) != texts:
                raise RuntimeError(f"{len(vectors)} vectors came back for {texts} texts")
        except DeviceLost:
            raise
        except Exception as error:
            if isinstance(error, OutOfMemory):
                metrics.OUT_OF_MEMORY_HALVINGS.inc()
                log.warning("Out of memory with %d texts; halving", texts)
                on_out_of_memory()
            if texts > 1:
                waiting += reversed(halves(batch, texts // 2))
            else:
                yield _failed(batch[0], error)
            continue
        ended = time.monotonic()
        if not np.isfinite(vectors).all():
            vectors = vectors.copy()
            yield from _recompute(batch, vectors, model)
        yield Computed(batch, slices, vectors, began, ended)


def _failed(part: Part, error: Exception) -> Failed:
    log.error("A text could not be embedded", exc_info=error)
    if isinstance(error, OutOfMemory):
        return Failed(part, "does not fit in the device's memory")
    return Failed(part, "could not be embedded")


def _recompute(batch: list[Part], vectors: Vectors, model: Model) -> Iterator[Failed]:
    """Replace each non-finite vector, in place, by one computed alone in float32."""
    parts = [part.cut(at, at + 1) for part in batch for at in range(len(part.rows))]
    for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
        metrics.NONFINITE_RECOMPUTATIONS.inc()
        log.warning("A vector was not finite; computing it again in float32")
        try:
            vectors[row] = model.exact.forward(parts[row].slices[0])[0]
            finite = bool(np.isfinite(vectors[row]).all())
        except DeviceLost:
            raise
        except Exception:
            log.exception("Computing a vector again failed")
            finite = False
        if not finite:
            yield Failed(parts[row], "has a vector that is not finite")
