"""The first batches of a model: they load its kernels and show how much fits in the device's memory."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from embedding_service.errors import StartupError
from embedding_service.inference.budget import BatchBudget
from embedding_service.inference.preprocessing import Preprocessor
from embedding_service.inference.runtime import Batch, Lane, OutOfMemory, Prepared, Slice

log = logging.getLogger(__name__)


# Provisional, until the budget is measured here.
CPU_BUDGET, CPU_OVERHEAD, ACCELERATOR_OVERHEAD = 512, 16, 2048


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What the first batches showed."""

    dimension: int
    max_batch_tokens: int
    budget: BatchBudget


def warm_up(
    lanes: Sequence[Lane],
    whole: Lane | None,
    preprocessor: Preprocessor,
    *,
    max_seq_length: int,
    max_batch_tokens: int,
    on_cpu: bool,
) -> WarmUp:
    """Run short and long texts on every lane. Raises StartupError if the longest does not fit in memory."""
    short, long = (
        preprocessor.prepare([text], None, None, None, parallel=False)
        for text in ("warm", "up " * max_seq_length)
    )
    dimension = int((whole or lanes[0]).forward(batch_of(short, 1)).shape[1])
    if on_cpu:
        budget = BatchBudget(min(max_batch_tokens, max(CPU_BUDGET, max_seq_length)), CPU_OVERHEAD)
        for text in (short, long):
            forward_at_once(lanes, batch_of(text, budget.tokens))
    else:
        max_batch_tokens = fit_memory(lanes, short, long, max_batch_tokens, max_seq_length)
        budget = BatchBudget(max_batch_tokens, ACCELERATOR_OVERHEAD)
    return WarmUp(dimension=dimension, max_batch_tokens=max_batch_tokens, budget=budget)


def batch_of(text: Prepared, tokens: int) -> Batch:
    """One text as many times as `tokens` hold it, and at least once."""
    return [Slice(text, np.zeros(max(1, tokens // int(text.lengths[0])), np.int32))]


def forward_at_once(lanes: Sequence[Lane], batch: Batch) -> None:
    """Run a batch on every lane at the same time."""
    with ThreadPoolExecutor(len(lanes)) as threads:
        list(threads.map(lambda lane: lane.forward(batch), lanes))


def fit_memory(
    lanes: Sequence[Lane], short: Prepared, long: Prepared, max_batch_tokens: int, max_seq_length: int
) -> int:
    """The tokens a batch may hold so that the batches of all lanes fit in the device's memory at once.

    That is `max_batch_tokens`, halved until the longest texts and the most texts fit. Raises
    StartupError if not even one text of full length does.
    """
    while True:
        try:
            for text in (long, short):
                forward_at_once(lanes, batch_of(text, max_batch_tokens))
            return max_batch_tokens
        except OutOfMemory:
            if max_batch_tokens <= max_seq_length:
                raise StartupError(
                    "The device's memory does not hold one text of MAX_SEQ_LENGTH tokens; lower it"
                ) from None
            max_batch_tokens = max(max_seq_length, max_batch_tokens // 2)
            log.warning(
                "BATCH_SIZE is more than the device's memory holds: running at most %d tokens at once",
                max_batch_tokens,
            )
