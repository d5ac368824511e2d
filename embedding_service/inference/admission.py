"""Decides which requests may queue, by the limit, the measured rate and deadlines. Not thread-safe."""

from embedding_service.errors import DeadlineExceeded, Overloaded

# A request is accepted if it should finish within this share of its time limit. Requests share the model
# fairly, so those that wait together finish together; if the rate were slightly wrong, all would be late.
ADMITTED_SHARE = 0.8

# Decay of the measured rate, per batch.
KEPT_SHARE = 0.9


class Admission:
    """Counts the tokens accepted and not yet answered, and how fast the model processes them."""

    def __init__(self, max_queued_tokens: int) -> None:
        self._max_queued_tokens = max_queued_tokens
        self._tokens = self._seconds = 0.0
        self._measured = 0.0
        self.queued_tokens = self._background_tokens = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over recent batches, weighted by their size; 0 if nothing has run."""
        return self._tokens / max(self._seconds, 1e-6)

    def admit(self, tokens: int, deadline: float, now: float, *, background: bool = False) -> None:
        """Accept a request. Raises DeadlineExceeded, or Overloaded with the time to wait.

        Requests in the background do not delay others, so they do not keep others out.
        """
        left = deadline - now
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the request was queued")
        queued, rate = self.queued_tokens, self.tokens_per_second
        if not background:
            queued -= self._background_tokens
        if queued and tokens:
            wait = (queued + tokens) / rate if rate else 0.0
            if queued + tokens > self._max_queued_tokens or wait > ADMITTED_SHARE * left:
                raise Overloaded(
                    f"{queued} tokens are waiting for the model; try again later",
                    retry_after_seconds=max(0.05, queued / rate / 2 if rate else 0.5),
                )
        self.queued_tokens += tokens
        if background:
            self._background_tokens += tokens

    def release(self, tokens: int, *, background: bool = False) -> None:
        """Remove tokens from the queue's count."""
        self.queued_tokens -= tokens
        if background:
            self._background_tokens -= tokens

    def begin(self, now: float) -> None:
        """The model starts after an idle time, which must not count."""
        self._measured = now

    def measure(self, tokens: int, now: float) -> None:
        """A batch has ended."""
        self._tokens = KEPT_SHARE * self._tokens + tokens
        self._seconds = KEPT_SHARE * self._seconds + max(0.0, now - self._measured)
        self._measured = now
