"""The queue: decides which texts are next and which share a batch. No threads, no locks."""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from embedding_service.inference.tokenized import NO_ROWS, IntArray

# A request with more texts than this is bulk; small requests go first if both are due. On a CPU, bulk texts
# share no batch with those of small requests, which would only wait longer for it.
SMALL_REQUEST_TEXTS = 8

# Small requests wait for the bulk batches in flight. So on a CPU, while they arrive, and for this long after
# the last one, a bulk batch is limited to this many times the tokens that cost as much as starting a batch:
# it is short, and bulk keeps two thirds of its speed.
SMALL_AGO_SECONDS, BULK_OVERHEADS = 1.0, 2

# While normal requests wait, they get this many tokens for each token of the background, which therefore
# never starves. All background requests share that, whatever their number and size.
NORMAL_PER_BACKGROUND = 15

# The share of its tokens that a batch may waste on padding. If nothing waits beyond the window, it may
# waste as much as another batch would cost, if that is more, since no better match is queued.
PADDING_SHARE = 0.08

# How far beyond one batch the queue looks for texts of similar length.
WINDOW_BATCHES, WINDOW_TEXTS = 4, 1024

# How many candidates to try for the longest text of a batch.
MAX_ENDS = 32

Indices = npt.NDArray[np.int64]


class QueueEntry(msgspec.Struct, eq=False, kw_only=True):
    """The place of a request in the queue: those of its texts that wait, in the order of their length.

    `rows` are the texts as their owner numbers them; `tokens` is the sum of `lengths`. `left` counts the
    tokens that no batch has taken yet, estimated for texts that are not tokenized. `tag` is the virtual time
    at which the next text is due.
    """

    owner: Any
    deadline: float
    background: bool
    bulk: bool = False
    left: int = 0
    tag: float = 0.0
    group: Hashable = None
    lengths: IntArray = NO_ROWS
    rows: IntArray = NO_ROWS
    tokens: int = 0
    queued: bool = False

    def take(self, first: int, last: int) -> tuple[IntArray, int]:
        """Remove the texts at these places; returns their rows and tokens."""
        rows, lengths = self.rows, self.lengths
        if last - first == len(rows):
            taken, tokens, self.rows, self.lengths = rows, self.tokens, NO_ROWS, NO_ROWS
        else:
            taken, tokens = rows[first:last], int(lengths[first:last].sum())
            self.rows = np.concatenate((rows[:first], rows[last:]))
            self.lengths = np.concatenate((lengths[:first], lengths[last:]))
        self.tokens -= tokens
        self.left -= tokens
        self.tag += tokens
        return taken, tokens


# By tag, then small before bulk, then in order of arrival.
_Waiting = tuple[float, bool, int, QueueEntry]

Taken = list[tuple[QueueEntry, IntArray]]


@dataclass(slots=True, eq=False)
class _Class:
    """Requests that share the model evenly: start-time fair queueing over tokens (Goyal et al. 1996)."""

    heap: list[_Waiting] = field(default_factory=list)
    entries: int = 0
    virtual_time: float = 0.0

    def leave(self, window: list[_Waiting], tokens: int) -> None:
        """Put back what a batch of this many tokens has left of the requests that it could choose from."""
        due, small = window[0][0], False
        for _, bulk, number, entry in window:
            small = small or not bulk
            entry.queued = len(entry.rows) > 0
            if entry.queued:
                heapq.heappush(self.heap, (entry.tag, bulk, number, entry))
        # If bulk runs and nothing small waits, the next arrival goes first.
        ahead = max(due, self.virtual_time + tokens / max(1, self.entries))
        self.virtual_time = ahead if small else due


class FairQueue:
    """Requests take turns by tokens, so that one of 2,048 texts shares the model instead of holding it.

    Those in the background are a class of their own, of weight 1/16. No batch holds texts of both classes.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        self._on_cpu = on_cpu
        self._normal, self._background = self._classes = _Class(), _Class()
        self._sequence = count()
        self._small_until = 0.0
        # Tokens that normal requests may still have before the background's turn.
        self._ahead = 0
        # Tokens that wait for a batch.
        self.tokens = 0
        # Accepted bulk requests that are not in the background.
        self.bulk = 0

    def __bool__(self) -> bool:
        return bool(self._normal.heap or self._background.heap)

    def virtual_time(self, *, background: bool) -> float:
        """The tag of a request that arrives now."""
        return self._classes[background].virtual_time

    def add(self, entry: QueueEntry, now: float) -> None:
        """Register an accepted request, whose share of the model starts now."""
        own = self._classes[entry.background]
        own.entries += 1
        entry.tag = own.virtual_time
        if not entry.background:
            if entry.bulk:
                self.bulk += 1
            else:
                self._small_until = now + SMALL_AGO_SECONDS

    def remove(self, entry: QueueEntry) -> None:
        """Forget a request that is done or dropped, and any of its texts that wait."""
        self._classes[entry.background].entries -= 1
        if entry.bulk and not entry.background:
            self.bulk -= 1
        self.tokens -= entry.tokens
        entry.rows = entry.lengths = NO_ROWS
        entry.tokens = entry.left = 0

    def push(self, entry: QueueEntry, lengths: IntArray, rows: IntArray, group: Hashable) -> None:
        """Queue these texts of a request, with their lengths in tokens."""
        if len(rows) == 1:
            tokens = int(lengths[0])
        else:
            order = lengths.argsort(kind="stable")
            lengths, rows = lengths[order], rows[order]
            tokens = int(lengths.sum())
        if len(entry.rows):
            lengths = np.concatenate((entry.lengths, lengths))
            order = lengths.argsort(kind="stable")
            lengths, rows = lengths[order], np.concatenate((entry.rows, rows))[order]
        entry.tokens += tokens
        self.tokens += tokens
        entry.lengths, entry.rows, entry.group = lengths, rows, group
        if not entry.queued:
            own = self._classes[entry.background]
            entry.queued = True
            entry.tag = max(entry.tag, own.virtual_time)
            heapq.heappush(own.heap, (entry.tag, entry.bulk, next(self._sequence), entry))

    def bulk_limit(self, budget: int, overhead: int, now: float) -> int:
        """How many tokens a batch may hold that requests with few texts may have to wait for."""
        if self._on_cpu and now < self._small_until:
            # A batch may cost nothing besides its tokens; a text must fit all the same.
            return max(1, min(budget, BULK_OVERHEADS * overhead))
        return budget

    def take(
        self, budget: int, bulk_limit: int, overhead: int, now: float
    ) -> tuple[Taken, int, list[QueueEntry]]:
        """The next batch as rows of requests, its tokens, and the requests whose deadline has passed.

        It holds at most `budget` tokens, padding included, and `bulk_limit` if it is bulk, but at least one
        text. `overhead` is what another batch would cost, in tokens.
        """
        late: list[QueueEntry] = []
        turns = [self._normal, self._background]
        if self._background.heap and self._ahead <= 0:
            turns.reverse()
        for own in turns:
            normal = own is self._normal
            window = _look(own.heap, budget if normal else bulk_limit, now, late)
            if not window:
                continue
            # Those that may share a batch with the first one.
            head = window[0][-1]
            fellows = [entry for *_, entry in window if entry.group == head.group]
            bulk = head.background or (self._on_cpu and head.bulk)
            if self._on_cpu and normal:
                fellows = [entry for entry in fellows if entry.bulk == head.bulk]
            taken, tokens = _choose(fellows, bulk_limit if bulk else budget, 0 if own.heap else overhead)
            own.leave(window, tokens)
            self.tokens -= tokens
            self._ahead = self._ahead - tokens if normal else NORMAL_PER_BACKGROUND * tokens
            return taken, tokens, late
        return [], 0, late


def _look(heap: list[_Waiting], budget: int, now: float, late: list[QueueEntry]) -> list[_Waiting]:
    """Pop the requests whose turn is nearest, until they hold enough to choose from."""
    window: list[_Waiting] = []
    batches, texts = 0.0, 0
    while heap and batches < WINDOW_BATCHES and texts < WINDOW_TEXTS:
        waiting = heapq.heappop(heap)
        entry = waiting[-1]
        if not len(entry.rows):
            entry.queued = False
        elif now > entry.deadline:
            entry.queued = False
            late.append(entry)
        else:
            window.append(waiting)
            # A long request must not keep the others out of the window.
            batches += min(1.0, entry.tokens / budget)
            texts += min(len(entry.rows), WINDOW_TEXTS // WINDOW_BATCHES)
    return window


def _choose(fellows: list[QueueEntry], limit: int, free: int) -> tuple[Taken, int]:
    """Take a batch with the longest text of the first request, and its tokens."""
    total = sum([entry.tokens for entry in fellows])
    texts = sum([len(entry.rows) for entry in fellows])
    padded = max([int(entry.lengths[-1]) for entry in fellows]) * texts
    if texts == 1 or (padded <= limit and padded - total <= max(free, PADDING_SHARE * padded)):
        return [(entry, entry.take(0, len(entry.rows))[0]) for entry in fellows], total
    return _choose_similar(fellows, limit, free)


def _choose_similar(fellows: list[QueueEntry], limit: int, free: int) -> tuple[Taken, int]:
    starts = [0, *accumulate([len(entry.rows) for entry in fellows])]
    if len(fellows) == 1:
        low, high = densest(fellows[0].lengths, starts[1] - 1, limit, free)
        rows, tokens = fellows[0].take(low, high)
        return [(fellows[0], rows)], tokens
    lengths = np.concatenate([entry.lengths for entry in fellows])
    # Stable, and each request is in order, so that a range of the whole is a range of each request.
    order = lengths.argsort(kind="stable")
    head = int((order == starts[1] - 1).argmax())
    low, high = densest(lengths[order], head, limit, free)
    chosen = order[low:high]
    chosen.sort()
    cuts = chosen.searchsorted(starts).tolist()
    batch, served = [], 0
    for index, entry in enumerate(fellows):
        size = cuts[index + 1] - cuts[index]
        if size:
            first = int(chosen[cuts[index]]) - starts[index]
            rows, tokens = entry.take(first, first + size)
            batch.append((entry, rows))
            served += tokens
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
