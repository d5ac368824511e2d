"""The requests in progress: accepted, queued, taken into batches, given their vectors. No threads here."""

import numpy as np

from embedding_service.engine import EmbedRequest, Receiver, Text, Vectors, check_characters
from embedding_service.errors import InvalidRequest, TooLarge
from embedding_service.inference.admission import Admission
from embedding_service.inference.distinct import Distinct, distinct
from embedding_service.inference.fair_queue import SMALL_REQUEST_TEXTS, FairQueue, QueueEntry
from embedding_service.inference.model import Model
from embedding_service.inference.pending import PendingRequest, Share
from embedding_service.inference.tokenized import FIRST_ROWS, IntArray, TokenizedTexts
from embedding_service.inference.vector_cache import VectorCache
from embedding_service.observability import metrics

# How long batches stay halved after running out of memory.
LOWERED_SECONDS = 60.0

# How texts are estimated before they are tokenized: characters per token at first, then what recent texts
# had, and special tokens.
CHARACTERS_PER_TOKEN, SPECIAL_TOKENS, KEPT_SHARE = 4, 2, 0.99


# A request is refused before it is tokenized if more than this waits.
BUSY_BATCHES = 8


class Scheduler:
    """What the batcher's threads share, under its lock. A request is in it from `accept` to `end`."""

    def __init__(self, model: Model, *, max_queued_tokens: int, cache_bytes: int) -> None:
        self._model = model
        self.queue = FairQueue(on_cpu=model.on_cpu)
        self._cache = VectorCache(cache_bytes) if cache_bytes else None
        self._admission = Admission(
            self.queue,
            model.budget,
            # Batches of several streams of an accelerator share it.
            streams=len(model.streams) if model.on_cpu else 1,
            max_queued_tokens=max_queued_tokens,
        )
        self._pending: set[PendingRequest] = set()
        self._seen_tokens, self._seen_characters = 1.0, float(CHARACTERS_PER_TOKEN)
        self._most_tokens = model.info.max_batch_tokens
        self._lowered_until = 0.0
        self._last_ended = 0.0

    @property
    def queued_tokens(self) -> int:
        """Tokens accepted and not yet answered."""
        return self._admission.queued_tokens

    @property
    def requests(self) -> tuple[int, int]:
        """How many requests wait for their first batch, and how many have begun; callable from any thread."""
        all_of_them = list(self._pending)
        begun = sum(one.entry.left < one.charge for one in all_of_them)
        return len(all_of_them) - begun, begun

    @property
    def fits_one_batch(self) -> bool:
        """Whether all that waits is probably one batch."""
        return self.queue.tokens <= min(self._model.budget.tokens, self._most_tokens)

    def pending(self, receiver: Receiver | None = None) -> list[PendingRequest]:
        """The requests of one receiver, or of all."""
        return [one for one in self._pending if receiver is None or one.receiver == receiver]

    def read(self, request: EmbedRequest, receiver: Receiver, number: int, now: float) -> PendingRequest:
        """A request with what must be computed for it, unless it must be cut first. Raises InvalidRequest."""
        model, texts = self._model, request.texts
        if not texts:
            raise InvalidRequest("there is no text to embed")
        dimension, wanted = model.info.embedding_dimension, request.dimensions
        if wanted is not None and not 1 <= wanted <= dimension:
            raise InvalidRequest(f"must be between 1 and {dimension}, not {wanted}", field="dimensions")
        prompt = model.prompt(request)
        pending = PendingRequest(
            request=request,
            receiver=receiver,
            number=number,
            submitted=now,
            prompt=prompt,
            # Everything other than the text that affects a vector.
            context=(model.info.fingerprint, prompt, request.input_type, request.truncation_side),
            entry=QueueEntry(
                owner=None, deadline=request.deadline, background=request.priority == "background"
            ),
            caches=self._cache is not None,
            raw=wanted is not None or not request.normalize,
            # A copy, where bad texts are replaced.
            texts=list(texts),
        )
        pending.entry.owner = pending
        if request.on_error == "null" and request.max_characters is not None:
            for index, text in enumerate(texts):
                try:
                    check_characters([text], request.max_characters)
                except TooLarge as error:
                    pending.refuse(index, error)
        if request.overflow in ("mean", "chunks"):
            pending.chunks = []
        else:
            self.look_up(pending, pending.texts)
        return pending

    def look_up(self, pending: PendingRequest, texts: list[Text]) -> None:
        """Find what must be computed of a request's texts or pieces. Raises TextTooLong."""
        alone = self._cache is None and len(texts) == 1
        found = pending.distinct = Distinct(texts) if alone else distinct(texts, pending.context, self._cache)
        count = pending.missing = len(found.texts)
        pending.characters = sum(map(len, found.texts)) + len(pending.prompt or "") * count
        pending.entry.bulk = count > SMALL_REQUEST_TEXTS
        if self._cache is not None:
            metrics.record_cache(found.hits, len(texts) - found.hits)
        if found.cached:
            cut = [entry.truncated for entry in found.cached]
            pending.refuse_truncated(cut, count, self._model.info.max_seq_length)

    @property
    def busy(self) -> bool:
        """Whether more waits than a few batches, so that requests may have to be refused."""
        return self._admission.queued_tokens > BUSY_BATCHES * self._model.budget.tokens

    def check(self, pending: PendingRequest, now: float) -> None:
        """Raise what `accept` will raise for a request, as far as its size can be estimated."""
        pending.entry.left = self._estimate(pending)
        self._admission.check(pending.entry, now)

    def hold(self, pending: PendingRequest) -> None:
        """Know a request that is not accepted yet, since it is being cut."""
        self._pending.add(pending)

    def accept(self, pending: PendingRequest, now: float) -> None:
        """Let a request wait for its turn. Raises Overloaded, TooLarge or DeadlineExceeded."""
        pending.charge = pending.entry.left = pending.tokens or self._estimate(pending)
        self._admission.admit(pending.entry, now)
        self._pending.add(pending)
        self.queue.add(pending.entry, now)
        pending.admitted = True
        if pending.arrived:
            self._arrived(pending, 0)

    def extend(self, pending: PendingRequest, part: TokenizedTexts) -> None:
        """Queue the next texts of an accepted request. Raises TextTooLong."""
        before = pending.arrived
        pending.add(part)
        if part.truncated.any():
            pending.refuse_truncated(part.truncated.tolist(), before, self._model.info.max_seq_length)
        self._arrived(pending, before)

    def _arrived(self, pending: PendingRequest, before: int) -> None:
        entry, tokenized = pending.entry, pending.tokenized
        assert tokenized is not None
        first, last = pending.first + before, pending.first + pending.arrived
        rows = FIRST_ROWS[first:last] if last <= len(FIRST_ROWS) else np.arange(first, last, dtype=np.int32)
        if pending.errors and pending.request.overflow == "error":
            rows = rows[~tokenized.truncated[first:last]]
        if len(rows):
            self.queue.push(
                entry,
                tokenized.lengths[first:last] if len(rows) == last - first else tokenized.lengths[rows],
                rows,
                tokenized.group,
            )
        entry.left = max(entry.left, entry.tokens)
        if pending.arrived == len(pending.distinct.texts):
            seen = pending.tokens - SPECIAL_TOKENS * pending.arrived
            self._seen_tokens = KEPT_SHARE * self._seen_tokens + seen
            self._seen_characters = KEPT_SHARE * self._seen_characters + pending.characters
            self._admission.queued_tokens += pending.tokens - pending.charge
            pending.charge = pending.tokens
            entry.left = entry.tokens
        self._admission.changed()

    def _estimate(self, pending: PendingRequest) -> int:
        count = len(pending.distinct.texts)
        tokens = pending.characters * self._seen_tokens / self._seen_characters + SPECIAL_TOKENS * count
        return min(round(tokens), self._model.info.max_seq_length * count)

    def take(self, now: float) -> tuple[list[Share], int, list[PendingRequest]]:
        """Take the next batch; also returns its tokens, and the requests whose deadline has passed."""
        if now > self._lowered_until:
            self._most_tokens = self._model.info.max_batch_tokens
        budget = self._model.budget
        most = min(budget.tokens, self._most_tokens)
        for_bulk = self.queue.bulk_limit(most, budget.overhead_tokens, now)
        if for_bulk < most and self.queue.bulk and not self._admission.finish_in_time(for_bulk, now):
            for_bulk = most
        taken, tokens, late = self.queue.take(most, for_bulk, budget.overhead_tokens, now)
        self._admission.running_tokens += tokens
        self._admission.changed()
        return [(entry.owner, rows) for entry, rows in taken], tokens, [entry.owner for entry in late]

    def ran(self, tokens: int) -> None:
        """A batch with this many tokens has ended or failed."""
        self._admission.running_tokens -= tokens
        self._admission.changed()

    def lower(self, now: float) -> None:
        """Halve batches for a while, since one did not fit in memory."""
        most = min(self._model.budget.tokens, self._most_tokens)
        self._most_tokens = max(self._model.info.max_seq_length, most // 2)
        self._lowered_until = now + LOWERED_SECONDS

    def measure(self, padded: int, began: float, ended: float) -> None:
        """Count a batch that has run in a stream; never in the one with all cores, whose cost is another."""
        # On an accelerator, batches of two streams run in turn: count only the time since the last one ended.
        since = began if self._model.on_cpu else max(began, self._last_ended)
        self._model.budget.observe(padded, ended - since)
        self._last_ended = ended

    def deliver(
        self, shares: list[Share], vectors: Vectors, unit: Vectors, began: float, ended: float
    ) -> list[PendingRequest]:
        """Give the requests their vectors, or those scaled to length 1.

        Returns the requests that have their last vector now, and so have ended.
        """
        done, first = [], 0
        for pending, rows in shares:
            last = first + len(rows)
            if self._cache is not None:
                _keep(self._cache, pending, rows, vectors[first:last])
            if not pending.finished and pending.receive(
                rows, (vectors if pending.raw else unit)[first:last], began, ended
            ):
                self.end(pending)
                done.append(pending)
            first = last
        return done

    def end(self, pending: PendingRequest) -> bool:
        """Forget a request; False if it has ended before."""
        if pending.finished:
            return False
        pending.finished = True
        self._pending.discard(pending)
        if pending.admitted:
            self.queue.remove(pending.entry)
            self._admission.queued_tokens -= pending.charge
            self._admission.leave(pending.entry)
        return True


def _keep(cache: VectorCache, pending: PendingRequest, rows: IntArray, vectors: Vectors) -> None:
    tokenized = pending.tokenized
    assert tokenized is not None
    lengths, truncated = tokenized.lengths[rows].tolist(), tokenized.truncated[rows].tolist()
    for row, vector, tokens, cut in zip(
        (rows - pending.first).tolist(), vectors, lengths, truncated, strict=True
    ):
        if np.isfinite(vector).all():
            cache.put(pending.context, pending.distinct.texts[row], vector, tokens, cut)
