"""The first batches of a model: they load its kernels and show how much fits in the device's memory."""

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from embedding_service.errors import StartupError
from embedding_service.inference.budget import BatchBudget, BatchCost, fit, measure
from embedding_service.inference.prepared import read_cost, save_cost
from embedding_service.inference.preprocessing import Preprocessor
from embedding_service.inference.runtime import OutOfMemory, Stream
from embedding_service.inference.store import Entry
from embedding_service.inference.streams import SessionStream
from embedding_service.inference.tokenized import Batch, Rows, TokenizedTexts

log = logging.getLogger(__name__)


# How long measuring what batches cost may take, in one number format.
MEASURING_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What the first batches revealed."""

    dimension: int
    max_batch_tokens: int
    budget: BatchBudget


def warm_up(
    streams: Sequence[SessionStream],
    all_cores: SessionStream | None,
    preprocessor: Preprocessor,
    *,
    max_seq_length: int,
    max_batch_tokens: int,
    on_cpu: bool,
    costs: Entry,
    tolerance: float,
) -> WarmUp:
    """Run short and long texts on every stream, and find out what batches cost, unless `costs` knows it.

    `tolerance` is how far vectors may differ for the number format, as a share of the largest number.
    Raises StartupError if the longest text does not fit in memory.
    """
    short, long = short_and_long(preprocessor, max_seq_length)
    if not on_cpu:
        max_batch_tokens = fit_memory(streams, short, long, max_batch_tokens, max_seq_length)
    alone = (all_cores or streams[0]).forward(batch_of(short, 1))
    beside = preprocessor.prepare(["up up up up up up"])
    padded = (all_cores or streams[0]).forward([Rows.all_of(short), Rows.all_of(beside)])[:1]
    if np.abs(padded - alone).max() > tolerance * np.abs(alone).max():
        log.warning("This model's vectors change with padding: only texts of equal length share a batch")
        for stream in (*streams, all_cores) if all_cores else streams:
            stream.without_padding = True
    cost = find_cost(streams, preprocessor, max_seq_length, max_batch_tokens, costs, on_cpu=on_cpu)
    budget = BatchBudget(cost, max_seq_length=max_seq_length, max_batch_tokens=max_batch_tokens)
    for text in (short, long):
        forward_at_once(streams, batch_of(text, min(budget.tokens, int(long.lengths[0]))))
    return WarmUp(dimension=int(alone.shape[1]), max_batch_tokens=max_batch_tokens, budget=budget)


def short_and_long(preprocessor: Preprocessor, max_seq_length: int) -> tuple[TokenizedTexts, TokenizedTexts]:
    """A text of one word, and one that is as long as the model reads."""
    return preprocessor.prepare(["warm"]), preprocessor.prepare(["up " * max_seq_length])


def batch_of(text: TokenizedTexts, tokens: int) -> Batch:
    """One text repeated to fill `tokens`, at least once."""
    return [Rows(text, np.zeros(max(1, tokens // int(text.lengths[0])), np.int32))]


def medium(preprocessor: Preprocessor, max_seq_length: int) -> TokenizedTexts:
    """A text whose length is halfway, by factors, between the shortest and the longest."""
    words = " ".join(["up"] * max(1, math.isqrt(max_seq_length) - 2))
    return preprocessor.prepare([words])


def find_cost(
    streams: Sequence[Stream],
    preprocessor: Preprocessor,
    max_seq_length: int,
    max_batch_tokens: int,
    costs: Entry,
    *,
    on_cpu: bool,
) -> BatchCost:
    """What a batch costs while every stream runs one, as under load: from the cache, or measured.

    Streams on a CPU have cores of their own; those of an accelerator share it, so that each batch has its
    part of the time in which all of them ran.
    """
    known = read_cost(costs)
    if known is not None:
        return known
    text = medium(preprocessor, max_seq_length)

    def run(tokens: int) -> float:
        batch = batch_of(text, tokens)
        began = time.perf_counter()
        list(threads.map(lambda stream: stream.forward(batch), streams))
        took = time.perf_counter() - began
        return took if on_cpu else took / len(streams)

    with ThreadPoolExecutor(len(streams)) as threads:
        measured = measure(
            run,
            int(text.lengths[0]),
            max_batch_tokens,
            seconds=MEASURING_SECONDS,
            # A batch may be one text of full length in any case.
            enough=max_seq_length if on_cpu else None,
        )
    cost = fit(measured)
    save_cost(costs, cost)
    return cost


def forward_at_once(streams: Sequence[Stream], batch: Batch) -> None:
    """Run a batch on every stream at the same time."""
    with ThreadPoolExecutor(len(streams)) as threads:
        list(threads.map(lambda stream: stream.forward(batch), streams))


def fit_memory(
    streams: Sequence[Stream],
    short: TokenizedTexts,
    long: TokenizedTexts,
    max_batch_tokens: int,
    max_seq_length: int,
) -> int:
    """The tokens a batch may hold so that the batches of all streams fit in the device's memory at once.

    That is `max_batch_tokens`, halved until the longest texts and the most texts fit. Raises
    StartupError if not even one text of full length does.
    """
    while True:
        try:
            # One stream gets the tokens of all, since streams that run together may miss each other's peaks.
            streams[0].forward(batch_of(long, len(streams) * max_batch_tokens))
            for text in (long, short):
                forward_at_once(streams, batch_of(text, max_batch_tokens))
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
