"""The queue: decides which texts are next and which share a batch. Not thread-safe."""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import accumulate, count

import numpy as np
import numpy.typing as npt

from embedding_service.inference.tokenized import IntArray

# A request with more texts than this is bulk; small requests go first if both are due. If `separate_bulk` is
# set, bulk texts share no batch with those of small requests, which would only wait longer for it.
SMALL_REQUEST_TEXTS = 8

# Small requests wait for the bulk batches in flight. So while they arrive, and for this long after the last
# one, a bulk batch is limited to this many times the tokens that cost as much as starting a batch: it is
# short, and bulk keeps two thirds of its speed. Only if `separate_bulk` is set.
SMALL_AGO_SECONDS, BULK_OVERHEADS = 1.0, 2

# The share of its tokens that a batch may waste on padding. If nothing waits beyond the window, it may
# waste as much as another batch would cost, if that is more, since no better match is queued.
PADDING_SHARE = 0.08

# How far beyond one batch the queue looks for texts of similar length.
WINDOW_BATCHES, WINDOW_TEXTS = 4, 1024

# How many candidates to try for the longest text of a batch.
MAX_ENDS = 32

_NOTHING: IntArray = np.empty(0, np.int32)

Indices = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False, kw_only=True)
class Flow:
    """One request in the queue: those of its texts that wait, in the order of their length.

    `rows` are the indices of the texts, `tag` is the virtual time at which the next one is due.
    """

    texts: list[str]
    deadline: float
    tag: float = 0.0
    group: Hashable = None
    lengths: IntArray = field(default_factory=lambda: _NOTHING)
    rows: IntArray = field(default_factory=lambda: _NOTHING)
    tokens: int = 0
    queued: bool = False
    finished: bool = False
    bulk: bool = False
    background: bool = False

    def take(self, first: int, last: int) -> IntArray:
        """Remove the texts at these places and return their rows."""
        rows, lengths = self.rows, self.lengths
        taken = rows[first:last]
        if len(taken) == len(rows):
            self.rows = self.lengths = _NOTHING
            self.tokens = 0
            return taken
        self.tokens -= int(lengths[first:last].sum())
        self.rows = np.concatenate((rows[:first], rows[last:]))
        self.lengths = np.concatenate((lengths[:first], lengths[last:]))
        return taken


_Entry = tuple[float, bool, int, Flow]

Batch = list[tuple[Flow, IntArray]]


class FairQueue:
    """Start-time fair queueing over tokens (Goyal et al. 1996): each request is a flow.

    A request of 2,048 texts shares the model with the others instead of holding it.
    """

    def __init__(self, *, separate_bulk: bool) -> None:
        self._separate_bulk = separate_bulk
        # By tag, then small before bulk, then in order of arrival.
        self._heap: list[_Entry] = []
        self._sequence = count()
        self._flows = 0
        self._virtual_time = 0.0
        self._small_until = 0.0
        # Tokens of all batches so far.
        self.served = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, flow: Flow, now: float) -> None:
        """Register an accepted request, whose share of the model starts now."""
        self._flows += 1
        flow.tag = self._virtual_time
        flow.bulk = len(flow.texts) > SMALL_REQUEST_TEXTS
        if not flow.bulk:
            self._small_until = now + SMALL_AGO_SECONDS

    def remove(self, flow: Flow) -> None:
        """Forget a request that is done or dropped, and any of its texts that wait."""
        self._flows -= 1
        flow.rows = flow.lengths = _NOTHING
        flow.tokens = 0

    def push(self, flow: Flow, lengths: IntArray, rows: IntArray, group: Hashable) -> None:
        """Queue these texts of a request, with their lengths in tokens."""
        if len(flow.rows):
            lengths = np.concatenate((flow.lengths, lengths))
            rows = np.concatenate((flow.rows, rows))
        if len(lengths) > 1:
            order = lengths.argsort(kind="stable")
            lengths, rows = lengths[order], rows[order]
        flow.tokens = sum(lengths.tolist())
        flow.lengths, flow.rows, flow.group = lengths, rows, group
        if not flow.queued:
            flow.queued = True
            flow.tag = max(flow.tag, self._virtual_time)
            heapq.heappush(self._heap, (flow.tag, flow.bulk, next(self._sequence), flow))

    def withdraw(self, flow: Flow, row: int) -> None:
        """Remove one text, if it is queued."""
        places = np.flatnonzero(flow.rows == row)
        if len(places):
            flow.take(int(places[0]), int(places[0]) + 1)

    def bulk_limit(self, budget: int, overhead: int, now: float) -> int:
        """How many tokens a batch may hold that requests with few texts may have to wait for."""
        if self._separate_bulk and now < self._small_until:
            return min(budget, BULK_OVERHEADS * overhead)
        return budget

    def next_batch(self, budget: int, overhead: int, now: float) -> tuple[Batch, list[Flow]]:
        """Take the next batch, as rows of requests, and the requests whose deadline has passed.

        It holds at most `budget` tokens, padding included, but at least one text. `overhead` is what
        another batch would cost, in tokens.
        """
        window, expired = self._look(budget, now)
        if not window:
            return [], expired
        due, _, _, head = window[0]
        limit, fellows = budget, [flow for *_, flow in window if flow.group == head.group]
        if self._separate_bulk:
            fellows = [flow for flow in fellows if flow.bulk == head.bulk]
            if head.bulk:
                limit = self.bulk_limit(budget, overhead, now)
        batch, served = _take(fellows, limit, 0 if self._heap else overhead)
        self.served += served
        for _, bulk, number, flow in window:
            flow.queued = len(flow.rows) > 0
            if flow.queued:
                heapq.heappush(self._heap, (flow.tag, bulk, number, flow))
        if all(bulk for _, bulk, _, _ in window):
            # Bulk runs and nothing small waits: the next arrival goes first.
            self._virtual_time = due
        else:
            self._virtual_time = max(due, self._virtual_time + served / max(1, self._flows))
        return batch, expired

    def _look(self, budget: int, now: float) -> tuple[list[_Entry], list[Flow]]:
        """Pop the flows whose turn is nearest, until they hold enough to choose from."""
        window: list[_Entry] = []
        expired: list[Flow] = []
        batches, texts = 0.0, 0
        heap = self._heap
        while heap and batches < WINDOW_BATCHES and texts < WINDOW_TEXTS:
            entry = heapq.heappop(heap)
            flow = entry[-1]
            if not len(flow.rows):
                flow.queued = False
            elif now > flow.deadline:
                flow.queued = False
                expired.append(flow)
            else:
                window.append(entry)
                # A long flow must not keep the others out of the window.
                batches += min(1.0, flow.tokens / budget)
                texts += min(len(flow.rows), WINDOW_TEXTS // WINDOW_BATCHES)
        return window, expired


def _take(fellows: list[Flow], limit: int, free: int) -> tuple[Batch, int]:
    """Take a batch with the longest text of the first flow, and its tokens; each flow pays for its own."""
    total = sum([flow.tokens for flow in fellows])
    texts = sum([len(flow.rows) for flow in fellows])
    padded = max([int(flow.lengths[-1]) for flow in fellows]) * texts
    if texts == 1 or (padded <= limit and padded - total <= max(free, PADDING_SHARE * padded)):
        batch = []
        for flow in fellows:
            flow.tag += flow.tokens
            batch.append((flow, flow.take(0, len(flow.rows))))
        return batch, total
    return _take_similar(fellows, limit, free)


def _take_similar(fellows: list[Flow], limit: int, free: int) -> tuple[Batch, int]:
    starts = [0, *accumulate([len(flow.rows) for flow in fellows])]
    if len(fellows) == 1:
        flow, before = fellows[0], fellows[0].tokens
        low, high = densest(flow.lengths, starts[1] - 1, limit, free)
        taken = flow.take(low, high)
        flow.tag += before - flow.tokens
        return [(flow, taken)], before - flow.tokens
    lengths = np.concatenate([flow.lengths for flow in fellows])
    # Stable, and each flow is in order, so that a range of the whole is a range of each flow.
    order = lengths.argsort(kind="stable")
    head = int((order == starts[1] - 1).argmax())
    low, high = densest(lengths[order], head, limit, free)
    chosen = order[low:high]
    chosen.sort()
    cuts = chosen.searchsorted(starts).tolist()
    batch, served = [], 0
    for index, flow in enumerate(fellows):
        size = cuts[index + 1] - cuts[index]
        if size:
            before = flow.tokens
            first = int(chosen[cuts[index]]) - starts[index]
            batch.append((flow, flow.take(first, first + size)))
            flow.tag += before - flow.tokens
            served += before - flow.tokens
    return batch, served


def densest(lengths: IntArray, head: int, limit: int, free: int) -> tuple[int, int]:
    """The range of these ascending lengths around `head` that brings most tokens within the limits.

    A range is low <= i < high. Padded to its longest it has at most `limit` tokens, of which at most
    `free` or PADDING_SHARE are padding. If nothing fits, it is the head alone.
    """
    room = max(1, limit // max(1, int(lengths[head])))
    first = max(0, head + 1 - room)
    near: Indices = np.maximum(1, lengths[first : head + room]).astype(np.int64)
    at = head - first
    sums = np.zeros(len(near) + 1, np.int64)
    near.cumsum(out=sums[1:])
    # Which text is the longest: the last of each length from the head's on.
    is_end = np.ones(len(near) - at, np.bool_)
    np.not_equal(near[at + 1 :], near[at:-1], out=is_end[:-1])
    ends = at + is_end.nonzero()[0]
    if len(ends) > MAX_ENDS:
        ends = ends[np.linspace(0, len(ends) - 1, MAX_ENDS).astype(np.int64)]
    lows = np.arange(at + 1)
    highs = np.maximum(at, np.minimum(lows + (limit // near[ends])[:, None] - 1, ends[:, None]))
    total = sums[highs + 1] - sums[: at + 1]
    padded = near[highs] * (highs - lows + 1)
    fits = (padded <= limit) & (padded - total <= np.maximum(free, PADDING_SHARE * padded))
    best = int((total * fits).argmax())
    if not fits.flat[best]:
        return head, head + 1
    return first + best % (at + 1), first + int(highs.flat[best]) + 1
