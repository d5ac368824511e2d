"""Computes identical texts once, within a request and across queued and running ones. Not thread-safe."""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embedding_service.inference.fair_queue import Flow
from embedding_service.inference.priority_queue import PriorityQueue
from embedding_service.inference.tokenized import IntArray
from embedding_service.inference.vector_cache import Cached, VectorCache


@dataclass(slots=True, frozen=True, eq=False)
class Reduction:
    """A request without the texts that are repeated or cached, and so need no computing.

    `places` maps each text of the request to its row in the texts to compute, followed by the cached ones.
    """

    texts: list[str]
    cached: list[Cached]
    places: IntArray

    @property
    def hits(self) -> int:
        """How many texts of the request the cache answered."""
        return int(np.count_nonzero(self.places >= len(self.texts)))

    def cut_places(self) -> list[int]:
        """Indices of the cached texts that were truncated."""
        cut = [len(self.texts) + row for row, entry in enumerate(self.cached) if entry.truncated]
        return np.flatnonzero(np.isin(self.places, cut)).tolist()


def reduce(texts: list[str], context: Hashable, cache: VectorCache | None) -> Reduction | None:
    """Remove repeated and cached texts from a request; None if there are none."""
    if cache is None and (len(texts) == 1 or len(set(texts)) == len(texts)):
        return None
    left: dict[str, int] = {}
    found: dict[str, tuple[int, Cached]] = {}
    for text in texts:
        if text not in left and text not in found:
            entry = cache.get(context, text) if cache is not None else None
            if entry is None:
                left[text] = len(left)
            else:
                found[text] = (len(found), entry)
    if len(left) == len(texts):
        return None
    places = [left[text] if text in left else len(left) + found[text][0] for text in texts]
    return Reduction(list(left), [entry for _, entry in found.values()], np.array(places, np.int32))


@dataclass(slots=True, eq=False)
class Shared:
    """A text that several requests need. `runner` is the request whose batch computes it, once one does."""

    takers: list[tuple["Sharer", int]]
    runner: "Sharer | None" = None


@dataclass(slots=True, eq=False, kw_only=True)
class Sharer(Flow):
    """A request that may share texts; `context` is everything besides the text that affects a vector."""

    context: Hashable
    shares: bool = False


class IdenticalTexts:
    """The queued and running texts, and the requests that need them.

    Each request has all its texts in the queue, and so its own turn. The request whose turn comes first
    computes a text for all, and the others' copies leave the queue.
    """

    def __init__(self, queue: PriorityQueue) -> None:
        self._queue = queue
        self._known: dict[Hashable, dict[str, Sharer | Shared]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def add(self, flow: Sharer, first: int, texts: Sequence[str]) -> list[int]:
        """Register distinct texts that are about to be queued; returns the rows already being computed."""
        known = self._known.setdefault(flow.context, {})
        if len(texts) == 1:
            if known.setdefault(texts[0], flow) is flow:
                return []
            again = {texts[0]}
        else:
            again = known.keys() & texts
            if not again:
                known.update(dict.fromkeys(texts, flow))
                return []
        running = []
        for row, text in enumerate(texts, first):
            if text not in again:
                known[text] = flow
            elif self._share(known, text, flow, row).runner is not None:
                running.append(row)
        return running

    def _share(self, known: dict[str, Sharer | Shared], text: str, flow: Sharer, row: int) -> Shared:
        entry = known[text]
        if not isinstance(entry, Shared):
            other, place = entry, entry.texts.index(text)
            other.shares = True
            runs = place not in other.rows
            entry = known[text] = Shared([(other, place)], other if runs else None)
        flow.shares = True
        entry.takers.append((flow, row))
        return entry

    def start(self, flow: Sharer, rows: IntArray) -> IntArray:
        """Mark rows as running and withdraw others' copies. Returns those that were not running yet."""
        if not flow.shares:
            return rows
        known = self._known[flow.context]
        mine = []
        for row in rows.tolist():
            entry = known.get(flow.texts[row])
            if isinstance(entry, Shared):
                if entry.runner is not None:
                    continue
                entry.runner = flow
                for other, place in entry.takers:
                    if other is not flow:
                        self._queue.withdraw(other, place)
            mine.append(row)
        return np.array(mine, np.int32)

    def others(self, flow: Sharer, rows: IntArray) -> Iterator[tuple[int, Sharer, int]]:
        """The other requests that need these rows: position in `rows`, request, and its own row."""
        if not flow.shares:
            return
        known = self._known.get(flow.context, {})
        for position, row in enumerate(rows.tolist()):
            entry = known.get(flow.texts[row])
            if isinstance(entry, Shared) and entry.runner is flow:
                for other, place in list(entry.takers):
                    if other is not flow:
                        yield position, other, place

    def deliver(self, flow: Sharer, rows: IntArray) -> None:
        """Forget rows that have been delivered."""
        if flow.shares or flow.finished:
            self.settle(flow, rows)
            return
        # No other request needs them, so delete them without looking at each.
        known = self._known[flow.context]
        deque(map(known.__delitem__, map(flow.texts.__getitem__, rows.tolist())), maxlen=0)
        self._prune(flow.context, known)

    def settle(self, flow: Sharer, rows: IntArray) -> None:
        """Forget rows of a batch, so that no other request waits for them."""
        known = self._known.get(flow.context, {})
        for row in rows.tolist():
            text = flow.texts[row]
            entry = known.get(text)
            if entry is flow or (isinstance(entry, Shared) and entry.runner is flow):
                del known[text]
        self._prune(flow.context, known)

    def drop(self, flow: Sharer) -> None:
        """Forget a request that ended before its texts were delivered."""
        known = self._known.get(flow.context, {})
        for text in flow.texts:
            entry = known.get(text)
            if entry is flow:
                del known[text]
            elif isinstance(entry, Shared):
                entry.takers = [(other, row) for other, row in entry.takers if other is not flow]
                if not entry.takers:
                    del known[text]
        self._prune(flow.context, known)

    def _prune(self, context: Hashable, known: dict[str, Sharer | Shared]) -> None:
        """Forget a context without texts, since callers may send any number of prompts."""
        if not known:
            self._known.pop(context, None)
