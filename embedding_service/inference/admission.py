"""Decides which requests may queue, by the work that is due before them. No threads, no locks.

Under start-time fair queueing a request waits only for what is due before its own last token: at most as
many tokens of each other request as it has itself. It delays each of them by at most its own tokens.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from embedding_service.errors import DeadlineExceeded, Overloaded, TooLarge
from embedding_service.inference.budget import BatchBudget
from embedding_service.inference.fair_queue import NORMAL_PER_BACKGROUND, FairQueue, QueueEntry

# A request is accepted if it should finish within this share of its time limit, and if no other request
# that would finish in time would then need more than the second share of what is left of its own.
ADMITTED_SHARE, PROTECTED_SHARE = 0.8, 0.85

# How often the search for the time to try again halves its interval.
HALVINGS = 20

Floats = npt.NDArray[np.float64]


class Due:
    """The work of waiting requests along virtual time: each is due from its tag on, token by token."""

    def __init__(self, entries: Iterable[QueueEntry]) -> None:
        found = [(entry.tag, entry.left, entry.deadline) for entry in entries if entry.left > 0]
        tags, left, self.deadlines = np.array(found, np.float64).reshape(-1, 3).T
        self.ends: Floats = tags + left
        self.total = float(left.sum())
        self._sorted = [(ends := np.sort(times), np.append(0, ends.cumsum())) for times in (tags, self.ends)]

    def before(self, time: Floats | float) -> Floats:
        """How many tokens are due before this virtual time."""
        begun, done = (
            (place := times.searchsorted(time)) * time - sums[place] for times, sums in self._sorted
        )
        result: Floats = begun - done
        return result


class Admission:
    """Counts the tokens accepted and not yet answered, and knows what they will take.

    `streams` is how many batches truly run at once, each at the cost that `budget` has measured.
    """

    def __init__(
        self, queue: FairQueue, budget: BatchBudget, *, streams: int, max_queued_tokens: int
    ) -> None:
        self._queue = queue
        self._budget = budget
        self._streams = streams
        self._max_queued_tokens = max_queued_tokens
        self._entries: dict[bool, set[QueueEntry]] = {False: set(), True: set()}
        # Made when needed, and again once the requests in it have changed.
        self._due: dict[bool, Due] = {}
        self._earliest = float("inf")
        self.running_tokens = 0
        self.queued_tokens = 0

    def admit(self, entry: QueueEntry, now: float) -> None:
        """Accept a request. Raises DeadlineExceeded, TooLarge, or Overloaded with the time to wait.

        Requests in the background delay others by their class's share only, so they keep nobody out.
        """
        self.check(entry, now)
        self._earliest = min(self._earliest, entry.deadline)
        self.queued_tokens += entry.left
        self._entries[entry.background].add(entry)
        self.changed()

    def check(self, entry: QueueEntry, now: float) -> None:
        """Raise if the request must be refused."""
        time_left = entry.deadline - now
        if time_left <= 0:
            raise DeadlineExceeded("the deadline passed before the request was queued")
        waiting = self.queued_tokens + entry.left
        soonest = min(time_left, self._earliest - now)
        if waiting > self._max_queued_tokens or self.seconds(waiting) > ADMITTED_SHARE * soonest:
            self._check(entry, time_left, now)

    def leave(self, entry: QueueEntry) -> None:
        """Forget a request that is done or dropped."""
        self._entries[entry.background].discard(entry)
        self.changed()

    def changed(self) -> None:
        """What waits has changed."""
        self._due.clear()

    def seconds(self, tokens: float, batch_tokens: int | None = None) -> float:
        """How long these tokens take, in batches of the budget's size or this one."""
        budget = self._budget
        batch = min(tokens, batch_tokens or budget.tokens) or 1
        alone = budget.cost.seconds(batch)
        return max(alone, tokens / batch * alone / self._streams)

    def tokens_within(self, seconds: float) -> float:
        """How many tokens can be embedded in this time: the inverse of `seconds`."""
        budget = self._budget
        many = seconds * self._streams * budget.tokens / budget.batch_seconds
        return many if many > budget.tokens else min(budget.tokens, budget.cost.tokens_within(seconds))

    def finish_in_time(self, batch_tokens: int, now: float) -> bool:
        """Whether all bulk requests finish in time if their batches hold no more than this."""
        bulk = [entry for entry in self._entries[False] if entry.bulk]
        if not bulk:
            return True
        earliest = min(entry.deadline for entry in bulk)
        work = self._queue.tokens + self.running_tokens + sum(entry.left - entry.tokens for entry in bulk)
        return self.seconds(work, batch_tokens) < ADMITTED_SHARE * (earliest - now)

    def _check(self, entry: QueueEntry, time_left: float, now: float) -> None:
        tokens = entry.left
        # Clients do not try again after TooLarge, so it needs more than a measurement at the start.
        if self._budget.confirmed and self.seconds(tokens) > time_left:
            possible = int(ADMITTED_SHARE * self.tokens_within(time_left))
            raise TooLarge(
                f"are about {tokens} tokens, more than can be embedded in the {time_left:.1f} s that the "
                f"request may take; send at most about {possible} at once",
                field="texts",
            )
        own, others = self._due_of(entry.background), self._due_of(not entry.background)
        self._earliest = min([*own.deadlines, *others.deadlines], default=float("inf"))
        if not tokens or not (own.total or others.total or self.running_tokens):
            return
        start = self._queue.virtual_time(background=entry.background)
        room = min(self._max_queued_tokens, self.tokens_within(ADMITTED_SHARE * time_left)) - tokens
        wait, due = 0.0, float(own.before(start + tokens)) + self.running_tokens
        if self._ahead(own, others, tokens, due, entry.background) > room:
            wait = self._wait(own, others, start, entry, room)
        if not entry.background:
            wait = max(wait, self._wait_for_others(own, start, tokens, now))
        if wait:
            raise Overloaded(
                f"{self.queued_tokens} tokens are waiting for the model; try again later",
                retry_after_seconds=max(0.05, wait),
            )

    def _due_of(self, background: bool) -> Due:
        if background not in self._due:
            self._due[background] = Due(self._entries[background])
        return self._due[background]

    def _ahead(self, own: Due, others: Due, tokens: int, due: float, background: bool) -> float:
        """The tokens that a request waits for: those due before its end, and the other class's share."""
        return due + self._of_other_class(others, due + tokens, background)

    def _of_other_class(self, others: Due, tokens: float, background: bool) -> float:
        """What the other class gets while this one gets these tokens."""
        return min(
            others.total, tokens * NORMAL_PER_BACKGROUND if background else tokens / NORMAL_PER_BACKGROUND
        )

    def _wait(self, own: Due, others: Due, start: float, entry: QueueEntry, room: float) -> float:
        """Seconds until enough has been done for the request to be accepted."""
        first, last = start, max(start, float(own.ends.max(initial=start)))
        for _ in range(HALVINGS):
            middle = (first + last) / 2
            due = float(own.before(middle + entry.left) - own.before(middle))
            if self._ahead(own, others, entry.left, due, entry.background) > room:
                first = middle
            else:
                last = middle
        done = float(own.before(last)) + self.running_tokens
        return self.seconds(done + self._of_other_class(others, done, entry.background))

    def _wait_for_others(self, own: Due, start: float, tokens: int, now: float) -> float:
        """Seconds until the request would make no other one late that is in time without it; 0 for none."""
        left = own.deadlines - now
        rate = self.tokens_within(1e3) / 1e3
        finish = (own.before(own.ends) + self.running_tokens) / rate
        later = finish + np.clip(own.ends - start, 0, tokens) / rate
        late = (finish <= left) & (later > PROTECTED_SHARE * left)
        if not late.any():
            return 0.0
        # While they run alone, what they need shrinks as fast as what they have left.
        enough = (later - PROTECTED_SHARE * left) / (1 - PROTECTED_SHARE)
        return float(np.minimum(enough, finish)[late].max())
