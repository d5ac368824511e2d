"""Two fair queues: normal requests, and those in the background, which get a small share. Not thread-safe."""

from collections.abc import Hashable

from embedding_service.inference.fair_queue import Batch, FairQueue, Flow
from embedding_service.inference.tokenized import IntArray

# While normal requests wait, they get this many tokens for each token of the background, which therefore
# never starves. All background requests share that, whatever their number and size.
NORMAL_PER_BACKGROUND = 15


class PriorityQueue:
    """The same methods as FairQueue. No batch holds both normal texts and texts of the background."""

    def __init__(self, *, separate_bulk: bool) -> None:
        self._normal = FairQueue(separate_bulk=separate_bulk)
        self._background = FairQueue(separate_bulk=False)
        # Tokens that normal requests may still have before the background's turn.
        self._ahead = 0

    def __bool__(self) -> bool:
        return bool(self._normal) or bool(self._background)

    def add(self, flow: Flow, now: float) -> None:
        """Register an accepted request."""
        self._of(flow).add(flow, now)

    def remove(self, flow: Flow) -> None:
        """Forget a request that is done or dropped, and any of its texts that wait."""
        self._of(flow).remove(flow)

    def push(self, flow: Flow, lengths: IntArray, rows: IntArray, group: Hashable) -> None:
        """Queue these texts of a request, with their lengths in tokens."""
        self._of(flow).push(flow, lengths, rows, group)

    def withdraw(self, flow: Flow, row: int) -> None:
        """Remove one text, if it is queued."""
        self._of(flow).withdraw(flow, row)

    def next_batch(self, budget: int, overhead: int, now: float) -> tuple[Batch, list[Flow]]:
        """As FairQueue.next_batch."""
        expired: list[Flow] = []
        if self._normal and (self._ahead > 0 or not self._background):
            batch, expired = self._take_normal(budget, overhead, now)
            if batch or not self._background:
                return batch, expired
        before = self._background.served
        limit = self._normal.bulk_limit(budget, overhead, now)
        batch, late = self._background.next_batch(limit, overhead, now)
        expired += late
        if batch:
            self._ahead = NORMAL_PER_BACKGROUND * (self._background.served - before)
            return batch, expired
        batch, late = self._take_normal(budget, overhead, now)
        return batch, expired + late

    def _take_normal(self, budget: int, overhead: int, now: float) -> tuple[Batch, list[Flow]]:
        before = self._normal.served
        found = self._normal.next_batch(budget, overhead, now)
        self._ahead -= self._normal.served - before
        return found

    def _of(self, flow: Flow) -> FairQueue:
        return self._background if flow.background else self._normal
