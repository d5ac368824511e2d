"""Runs a batch in a stream, halves it if it fails, and sets apart texts whose vectors are not finite."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from embedding_service.engine import Vectors
from embedding_service.inference.model import Model
from embedding_service.inference.pending import Share, rows_of
from embedding_service.inference.runtime import DeviceLost, OutOfMemory, Stream
from embedding_service.inference.tokenized import BoolArray
from embedding_service.observability import metrics

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Computed:
    """The vectors of a batch, of shape (rows, dimension), and when they were computed (monotonic clock).

    `texts`, `tokens` and `padded` count the whole batch. `spoiled` are the texts that had no finite vector,
    which are no longer among the `shares`; `failed` are those without a vector, and why: their rows are NaN.
    """

    shares: list[Share]
    vectors: Vectors
    texts: int
    tokens: int
    padded: int
    began: float
    ended: float
    spoiled: list[Share] = field(default_factory=list)
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
        counts = lengths.tolist()
        texts = len(counts)
        failed: list[tuple[Share, str]] = []
        spoiled: list[Share] = []
        began = time.monotonic()
        on_start(began)
        try:
            vectors = stream.forward(rows)
            if len(vectors) != texts:
                raise RuntimeError(f"{len(vectors)} vectors came back for {texts} texts")
            ended = time.monotonic()
            if not np.isfinite(vectors).all():
                good: BoolArray = np.logical_and.reduce(np.isfinite(vectors), axis=1)
                batch, spoiled = _where(good, batch), _where(~good, batch)
                vectors = vectors[good]
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
        padded = max(counts) * texts
        found.append(Computed(batch, vectors, texts, sum(counts), padded, began, ended, spoiled, failed))
    return found


def recompute(text: Share, model: Model) -> Computed:
    """Compute a vector that was not finite again, alone and in float32. Raises DeviceLost."""
    metrics.NONFINITE_RECOMPUTATIONS.inc()
    log.warning("A vector was not finite; computing it again in float32")
    began = time.monotonic()
    vectors: Vectors = np.full((1, model.info.embedding_dimension), np.nan, np.float32)
    failed = []
    try:
        vectors = model.exact.forward(rows_of([text])[0])
    except DeviceLost:
        raise
    except Exception:
        log.exception("Computing a vector again failed")
    if not np.isfinite(vectors).all():
        vectors = np.full_like(vectors, np.nan)
        failed = [(text, "has a vector that is not finite")]
    return Computed([text], vectors, 1, 0, 0, began, time.monotonic(), failed=failed)


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


def _where(mask: BoolArray, shares: Sequence[Share]) -> list[Share]:
    """The rows of a batch for which the mask is true."""
    found, first = [], 0
    for pending, rows in shares:
        chosen = rows[mask[first : first + len(rows)]]
        first += len(rows)
        if len(chosen):
            found.append((pending, chosen))
    return found
