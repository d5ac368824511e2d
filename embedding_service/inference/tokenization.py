"""Tokenizes jobs: small ones in the thread that brings them, large ones in a thread, piece by piece."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from embedding_service.errors import DeadlineExceeded, InvalidRequest, ModelFailure, ServiceError
from embedding_service.inference.job import Job, Piece, refuse_truncated
from embedding_service.inference.model import Model
from embedding_service.inference.tokenized import TokenizedTexts

log = logging.getLogger(__name__)

# A request of up to this many texts and characters is tokenized by the thread that brings it, together
# with others that it brings, which saves a thread switch. A larger one is tokenized by the tokenizer
# thread in pieces, in turn, so that no request waits for the tokenization of another's 2,048 texts.
INLINE_TEXTS, INLINE_CHARACTERS = 64, 16_384
PIECE_TEXTS, PIECE_CHARACTERS = 128, 131_072

# From this many texts on, the tokenizer's own threads save more than they cost.
PARALLEL_TEXTS = 16


class Tokenization:
    """Calls `on_tokenized` with pieces of jobs and the seconds that they took, or `on_failed`."""

    def __init__(
        self,
        model: Model,
        *,
        is_idle: Callable[[], bool],
        on_tokenized: Callable[[list[tuple[Job, Piece]], float], None],
        on_failed: Callable[[Job, ServiceError], None],
    ) -> None:
        self._model = model
        self._is_idle = is_idle
        self._on_tokenized = on_tokenized
        self._on_failed = on_failed
        self._large: deque[Job] = deque()
        self._work = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run_forever, name="tokenizer", daemon=True).start()

    def add(self, jobs: Sequence[Job]) -> None:
        """Tokenize small jobs here, those of one context at once, and leave large ones to the thread."""
        together: dict[Hashable, list[Job]] = {}
        large = []
        for job in jobs:
            if len(job.texts) > INLINE_TEXTS or job.characters > INLINE_CHARACTERS:
                large.append(job)
            else:
                together.setdefault(job.context, []).append(job)
        for small in together.values():
            self._guarded(self._tokenize_together, small)
        if large:
            with self._work:
                self._large += large
                self._work.notify()

    def close(self) -> None:
        """End the thread once it has passed over the jobs that it still has, which must have ended."""
        with self._work:
            self._closed = True
            self._work.notify_all()

    def _run_forever(self) -> None:
        while True:
            with self._work:
                while not self._large:
                    if self._closed:
                        return
                    self._work.wait()
                job = self._large.popleft()
            self._guarded(self._tokenize_piece, [job])
            if not job.finished and job.tokenized < len(job.texts):
                with self._work:
                    self._large.append(job)

    def _guarded(self, step: Callable[[list[Job]], None], jobs: list[Job]) -> None:
        """Run a step; an exception fails only these jobs and never ends the thread."""
        try:
            step(jobs)
        except BaseException as error:  # a panic of the Rust tokenizer is not an Exception
            if len(jobs) > 1:
                for job in jobs:
                    self._guarded(step, [job])
                return
            if not isinstance(error, ServiceError):
                log.exception("Tokenization failed")
                error = ModelFailure("the request could not be tokenized")
            self._on_failed(jobs[0], error)

    def _tokenize_together(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.finished and not job.tokenized]
        if jobs:
            self._tokenize([(job, 0, len(job.texts)) for job in jobs])

    def _tokenize_piece(self, jobs: list[Job]) -> None:
        (job,) = jobs
        if not job.finished:
            first = job.tokenized
            self._tokenize([(job, first, len(_piece(job.texts, first)))])

    def _tokenize(self, pieces: list[tuple[Job, int, int]]) -> None:
        """Tokenize texts of jobs of one context, each piece a job, its first text and its size."""
        began = time.monotonic()
        job, first, size = pieces[0]
        if began > job.deadline:
            raise DeadlineExceeded("the deadline passed in the queue")
        texts = [text for job, first, size in pieces for text in job.texts[first : first + size]]
        request, model = job.request, self._model
        idle = size > INLINE_TEXTS and self._is_idle()
        parallel = len(texts) >= PARALLEL_TEXTS and (not model.on_cpu or idle)
        try:
            prepared = model.preprocessor.prepare(
                texts, job.prompt, request.input_type, request.truncation_side, parallel=parallel
            )
        except InvalidRequest as error:
            if error.index is not None:
                error.index = job.index_of(first + error.index)
            raise
        self._refuse_truncated(pieces, prepared)
        made, offset = [], 0
        for job, first, size in pieces:
            made.append((job, Piece(first, size, prepared, offset)))
            offset += size
        self._on_tokenized(made, time.monotonic() - began)

    def _refuse_truncated(self, pieces: list[tuple[Job, int, int]], prepared: TokenizedTexts) -> None:
        if not any(job.request.overflow == "error" for job, _, _ in pieces):
            return
        if len(pieces) > 1:
            raise ValueError("each for itself")
        job, first, _ = pieces[0]
        cut = [job.index_of(first + row) for row in np.flatnonzero(prepared.truncated).tolist()]
        refuse_truncated(cut, self._model.info.max_seq_length)


def _piece(texts: list[str], first: int) -> list[str]:
    last, characters = first, 0
    while last < len(texts) and last - first < PIECE_TEXTS and characters < PIECE_CHARACTERS:
        characters += len(texts[last])
        last += 1
    return texts[first:last]
