"""How many padded tokens a batch should hold, from what batches cost on this machine.

A batch of n padded tokens takes about a + b·n seconds. Larger batches spread a over more tokens, but the
next request waits longer. The budget is the smallest that is nearly as fast as the largest batch, and
no larger than a newcomer may be asked to wait for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

# The budget may give up this share of the highest rate.
SLOWER = 0.05

# On average, a new request finds the running batch half done. If a batch takes no longer than two texts of
# full length, the mean wait is at most one such text, which is unavoidable.
LONGEST_TEXTS = 2

# A batch up to this long is always acceptable, since users do not notice the wait.
UNNOTICED_SECONDS = 0.05

# While running: how far one batch corrects the estimated cost, and the largest error it may report. A batch
# that another process interrupted counts as one that is a fifth slower.
CORRECTION, MAX_ERROR = 0.1, 0.2

# No batch is faster than it can be. If this many in a row are much faster, the cost was measured while
# something else used the machine, and they correct it at once.
FASTER_IN_A_ROW = 4

# The budget is recomputed after this many batches, and changes only if it is off by this factor.
RECKONED_AFTER, CHANGED_BY = 32, 1.25

# At warm-up each size is measured this many times, time permitting; the fastest run counts.
ROUNDS = 5


@dataclass(slots=True)
class BatchCost:
    """What batches cost: `batch_seconds` each, and `token_seconds` for each padded token."""

    batch_seconds: float
    token_seconds: float

    def seconds(self, tokens: float) -> float:
        """How long a batch takes."""
        return self.batch_seconds + tokens * self.token_seconds

    def tokens_within(self, seconds: float) -> float:
        """How many tokens take this long."""
        return max(0.0, seconds - self.batch_seconds) / self.token_seconds


class BatchBudget:
    """The budget of the batches of a model's streams.

    `tokens` is what a batch should hold now: at most `max_batch_tokens`, and at least one text of full
    length. Padding of `overhead_tokens` costs as much as one more batch. `confirmed` says that a large batch
    has run, so that the cost of tokens is known from more than a measurement beside unknown other work.
    """

    def __init__(self, cost: BatchCost, *, max_seq_length: int, max_batch_tokens: int) -> None:
        self.cost = cost
        self._max_seq_length = max_seq_length
        self._max_batch_tokens = max_batch_tokens
        self._observed = 0
        self.confirmed = False
        # The errors of the latest batches, if all of them were much faster than expected.
        self._faster: list[float] = []
        self.tokens = self._best()
        self.overhead_tokens = self._overhead()

    @property
    def batch_seconds(self) -> float:
        """How long a batch of `tokens` lasts."""
        return self.cost.seconds(self.tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn how long a batch of this many padded tokens took in a stream other than `all_cores`."""
        cost = self.cost
        expected = cost.seconds(tokens)
        error = seconds / expected - 1
        self._faster = [*self._faster, error] if error < -MAX_ERROR else []
        correction = CORRECTION * min(MAX_ERROR, max(-MAX_ERROR, error))
        if wrong := len(self._faster) == FASTER_IN_A_ROW:
            correction = max(self._faster)
            self._faster = []
        share = cost.batch_seconds / expected
        # Each part is corrected by its share, so that large batches teach b and small ones a.
        cost.batch_seconds *= 1 + correction * share
        cost.token_seconds *= 1 + correction * (1 - share)
        self.confirmed = self.confirmed or share < 0.5
        self._observed += 1
        if wrong or self._observed % RECKONED_AFTER == 0:
            self.overhead_tokens = self._overhead()
            best = self._best()
            if not 1 / CHANGED_BY < best / self.tokens < CHANGED_BY:
                self.tokens = best

    def _overhead(self) -> int:
        return round(self.cost.batch_seconds / self.cost.token_seconds)

    def _best(self) -> int:
        cost, most = self.cost, self._max_batch_tokens
        a, b = cost.batch_seconds, cost.token_seconds
        # From n / (a + bn) = (1 - SLOWER) · most / (a + b · most).
        enough = (1 - SLOWER) * most * a / (a + SLOWER * b * most)
        longest_wait = max(UNNOTICED_SECONDS, LONGEST_TEXTS * cost.seconds(self._max_seq_length))
        tokens = math.ceil(min(enough, cost.tokens_within(longest_wait)))
        return min(most, max(self._max_seq_length, tokens))


def measure(
    run: Callable[[int], float], smallest: int, largest: int, *, seconds: float, enough: int | None = None
) -> dict[int, float]:
    """Seconds of a batch by its tokens, from `smallest` in doublings, as far as the time allows.

    `run` runs a batch of this many tokens and returns how long it took. From `enough` on, doubling ends
    once it makes a token hardly cheaper, since scratch memory grows with the largest batch.
    """
    fastest: dict[int, float] = {}
    sizes: list[int] = []
    size = smallest
    while size <= largest and (not sizes or seconds > 0):
        # Twice, since the first batch of a shape also prepares for it.
        first, second = run(size), run(size)
        seconds -= first + second
        fastest[size] = min(first, second)
        sizes.append(size)
        if enough is not None and size >= max(enough, 2 * smallest):
            gain = fastest[size // 2] / fastest[size] * 2
            if gain < 1 + SLOWER:
                break
        # The next size costs twice that, twice, and again in every round.
        if seconds < 8 * fastest[size]:
            break
        size *= 2
    for _ in range(ROUNDS - 1):
        for size in sizes:
            if seconds < fastest[size]:
                return fastest
            took = run(size)
            seconds -= took
            fastest[size] = min(fastest[size], took)
    return fastest


def fit(measured: Mapping[int, float]) -> BatchCost:
    """The cost that fits the measurements best.

    Errors are weighted by the inverse square root of the time: large batches, which decide the budget, weigh
    more than they would by relative error, and small ones still count.
    """
    tokens, seconds = np.array(list(measured)), np.array(list(measured.values()))
    weights = 1 / np.sqrt(seconds)
    rows = np.stack([weights, tokens * weights], axis=1)
    (batch, token), *_ = np.linalg.lstsq(rows, seconds * weights, rcond=None)
    largest = seconds[-1] / tokens[-1]
    # Noise may make a part that is nearly zero negative.
    token = min(largest, max(float(token), 0.01 * largest))
    batch = max(float(batch), 0.001 * seconds[0])
    return BatchCost(float(batch), float(token))
