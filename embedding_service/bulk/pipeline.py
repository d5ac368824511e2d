"""Embeds rows into a part file, in order, with several requests in flight."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import msgspec
import numpy as np

from embedding_service.bulk.embedders import Description, Embedder, Embedding, Lost, Stopped
from embedding_service.bulk.part import PartFile, Place
from embedding_service.bulk.rows import Row
from embedding_service.engine import Vectors
from embedding_service.errors import ServiceError, StartupError

# Maximum number of characters in a request, unless a single text has more.
CHUNK_CHARACTERS = 1_000_000

PROBE = "probe"

# Statuses that are not the texts' fault: those to retry after a wait, and those that a wait does not cure.
RETRYABLE = {429, 502, 503}
FATAL = {401, 403, 404, 405, 412}

# Attempts at a single failing text before its row counts as bad.
TRIES = 3

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.25, 30.0

Result = TypeVar("Result")


class EmbeddedRows(msgspec.Struct, frozen=True):
    """Some embedded rows (NaN for bad ones), their places, the bad rows, and a count of truncated texts."""

    texts: int
    vectors: Vectors
    places: list[Place]
    bad: list[Row]
    truncated: int


class Patient:
    """Retries an embedder that is busy or unreachable, and isolates the texts that it rejects."""

    def __init__(
        self, embedder: Embedder, give_up_seconds: float, tell: Callable[[str], None] = lambda _message: None
    ) -> None:
        """Wait for the embedder. Raises StartupError if it does not get ready or refuses the options."""
        self._embedder = embedder
        self._give_up_seconds = give_up_seconds
        self._tell = tell
        # Interrupts all waits once it is set.
        self.stopping = threading.Event()
        self._last_success = time.monotonic()
        self._known: Description | None = None
        try:
            self.description = self._known = self._persist(embedder.describe)
            self.dimension = self._persist(lambda: embedder.embed([PROBE]))[0].vectors.shape[1]
        except (Stopped, ServiceError) as error:
            raise StartupError(str(error)) from None

    def close(self) -> None:
        """Release the embedder's resources."""
        self._embedder.close()

    def embed(self, rows: list[Row]) -> EmbeddedRows:
        """Embed the rows that have a text. Raises Stopped if the embedder can no longer be used."""
        texts = [row.text for row in rows if not row.error]
        outcomes = iter(self._embed(texts) if texts else [])
        vectors: list[Vectors] = []
        places: list[Place] = []
        bad: list[Row] = []
        truncated = 0
        for row in rows:
            outcome = row.error or next(outcomes)
            if isinstance(outcome, str):
                bad.append(msgspec.structs.replace(row, error=outcome))
                outcome = Embedding(np.full((1, self.dimension), np.nan, np.float32))
            vectors.append(outcome.vectors)
            places += [Place(row.number, *span) for span in outcome.spans]
            truncated += outcome.is_truncated
        return EmbeddedRows(len(rows), np.concatenate(vectors), places, bad, truncated)

    def _embed(self, texts: list[str]) -> list[Embedding | str]:
        """An embedding or an error for each text; halves a rejected batch to find the bad texts."""
        try:
            return [*self._request(texts)]
        except ServiceError as error:
            if len(texts) == 1:
                return [self._retry_single(texts[0], error)]
        half = len(texts) // 2
        return self._embed(texts[:half]) + self._embed(texts[half:])

    def _retry_single(self, text: str, error: ServiceError) -> Embedding | str:
        """Retry a single failed text if the fault may be the service's; else return its error."""
        tries = 1
        for attempt in count():
            if error.status < 500 or tries == TRIES:
                break
            self._wait(error, attempt)
            try:
                self._request([PROBE])
            except ServiceError:
                continue  # the text is not to blame
            try:
                return self._request([text])[0]
            except ServiceError as again:
                error, tries = again, tries + 1
        return f"the text {error.reason}" if error.index is not None else error.message

    def _request(self, texts: list[str]) -> list[Embedding]:
        embeddings = self._persist(lambda: self._embedder.embed(texts))
        dimension = embeddings[0].vectors.shape[1]
        if dimension != self.dimension:
            raise Stopped(f"the vectors now have {dimension} dimensions instead of {self.dimension}")
        return embeddings

    def _persist(self, ask: Callable[[], Result]) -> Result:
        """Ask until there is an answer. Raises ServiceErrors that the texts may have caused."""
        was_away = False
        for attempt in count():
            try:
                if was_away:
                    description = self._embedder.describe()
                    # The vectors of another model must not be mixed in.
                    if self._known and description.fingerprint != self._known.fingerprint:
                        names = f"{description.model_name} instead of {self._known.model_name}"
                        raise Stopped(f"the service now runs another model: {names}")
                result = ask()
            except ServiceError as error:
                if error.status in FATAL:
                    raise Stopped(f"{error.message} (HTTP {error.status})") from None
                if error.status not in RETRYABLE:
                    raise
                was_away = was_away or error.status != 429
                self._wait(error, attempt)
            else:
                self._last_success = time.monotonic()
                return result
        raise AssertionError("unreachable")

    def _wait(self, error: ServiceError, attempt: int) -> None:
        if isinstance(error, Lost) and self._known is None:
            raise Stopped(error.message)
        asked = error.retry_after_seconds
        seconds = min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_WAIT_SECONDS) if asked is None else asked
        # Jitter, so that clients with the same wait do not all return at once.
        seconds *= 1 + random.random() / 4
        if time.monotonic() + seconds - self._last_success > self._give_up_seconds:
            raise Stopped(f"nothing was embedded in {self._give_up_seconds:.0f} s: {error.message}")
        if seconds > 5:
            self._tell(f"waiting {seconds:.0f} s: {error.message}")
        if self.stopping.wait(seconds):
            raise Stopped("interrupted")


def run(
    rows: Iterable[Row], embedder: Patient, part: PartFile, *, chunk_rows: int, in_flight: int
) -> Iterator[EmbeddedRows]:
    """Embed the rows and append them to the part in order, holding only a few chunks in memory.

    Yields each chunk once it is written.
    """
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="embed")
    pending: deque[Future[EmbeddedRows]] = deque()

    def write_oldest() -> EmbeddedRows:
        chunk = pending.popleft().result()
        part.append(chunk.vectors, chunk.bad, chunk.places)
        return chunk

    try:
        for chunk in chunks(rows, chunk_rows):
            pending.append(pool.submit(embedder.embed, chunk))
            # Keep twice as many pending, so that a slow chunk does not leave the other threads idle.
            if len(pending) >= 2 * in_flight:
                yield write_oldest()
        while pending:
            yield write_oldest()
    finally:
        embedder.stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)


def chunks(rows: Iterable[Row], chunk_rows: int) -> Iterator[list[Row]]:
    """Yield lists of at most `chunk_rows` rows and CHUNK_CHARACTERS, unless a single row has more."""
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        if chunk and (len(chunk) == chunk_rows or characters + len(row.text) > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(row)
        characters += len(row.text)
    if chunk:
        yield chunk
