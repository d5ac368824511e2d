"""LocalEngine: the model and its batcher in this process."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from embedding_service.engine import (
    GRACE_SECONDS,
    Chunk,
    Embeddings,
    EmbedRequest,
    ModelInfo,
    SplitRequest,
    Status,
    TokenizedText,
    TokenizeRequest,
    TokensRequest,
    TokenVectors,
    Vectors,
)
from embedding_service.errors import (
    DeadlineExceeded,
    ModelFailure,
    ServiceError,
    StartupError,
    TooLarge,
    Unavailable,
)
from embedding_service.inference.batcher import Batcher
from embedding_service.inference.job import Job, Outcome, Receiver
from embedding_service.inference.runtime import Runtime
from embedding_service.inference.sampling import Sampler, find_gpu
from embedding_service.inference.settings import ModelSettings
from embedding_service.observability import logs, metrics

log = logging.getLogger(__name__)

# How many texts are tokenized before the deadline is checked again.
TOKENIZE_PIECE_TEXTS = 64

# An answer with vectors of tokens may hold this many numbers: about 40 MB of JSON.
MAX_NUMBERS = 4_000_000

Tokenized = TypeVar("Tokenized")


class LocalEngine:
    """Loads the model in a thread of its own; until it is there, `embed` raises Unavailable."""

    def __init__(
        self,
        settings: ModelSettings,
        *,
        on_status: Callable[[Status], None] = lambda _status: None,
        load: Callable[[ModelSettings], Runtime] | None = None,
    ) -> None:
        self._settings = settings
        self._on_status = on_status
        self._load_runtime = load or _load_model
        self._batcher: Batcher | None = None
        self._sampler: Sampler | None = None
        self._runtime: Runtime | None = None
        self._closed = False
        self._status = Status(state="loading", reason=f"loading {settings.embedding_model}")
        self.startup_error: StartupError | None = None
        self.loaded = threading.Event()
        self._thread = threading.Thread(target=self._load, name="load", daemon=True)
        self._thread.start()

    def submit(self, request: EmbedRequest, on_done: Callable[[Outcome], None]) -> Job:
        """Queue a request as Batcher.submit does."""
        return self._loaded_batcher().submit(request, on_done)

    def submit_all(self, calls: Sequence[tuple[int, EmbedRequest]], receiver: Receiver) -> None:
        """Queue requests that came together as Batcher.submit_all does."""
        try:
            batcher = self._loaded_batcher()
        except Unavailable as error:
            receiver([(number, error) for number, _ in calls])
            return
        batcher.submit_all(calls, receiver)

    def cancel(self, job: Job) -> None:
        """Drop a request that nothing waits for."""
        if self._batcher is not None:
            self._batcher.cancel(job)

    def cancel_all(self, receiver: Receiver) -> None:
        """Drop all requests of a receiver that is gone."""
        if self._batcher is not None:
            self._batcher.cancel_all(receiver)

    def _loaded_batcher(self) -> Batcher:
        if self._batcher is None:
            raise Unavailable(self._status.reason, retry_after_seconds=1)
        return self._batcher

    def embed(self, request: EmbedRequest) -> Embeddings:
        done = threading.Event()
        outcomes: list[Outcome] = []

        def finish(outcome: Outcome) -> None:
            outcomes.append(outcome)
            done.set()

        job = self.submit(request, finish)
        if not done.wait(request.deadline - time.monotonic() + GRACE_SECONDS):
            self.cancel(job)
            raise DeadlineExceeded("the model did not answer before the deadline")
        outcome = outcomes[0]
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    def tokenize(self, request: TokenizeRequest) -> list[TokenizedText]:
        def list_tokens(runtime: Runtime, texts: list[str]) -> list[TokenizedText]:
            return runtime.list_tokens(texts, request.add_special_tokens)

        return self._in_pieces(request, list_tokens)

    def split(self, request: SplitRequest) -> list[list[Chunk]]:
        def split(runtime: Runtime, texts: list[str]) -> list[list[Chunk]]:
            return runtime.split(texts, request)

        return self._in_pieces(request, split)

    def embed_tokens(self, request: TokensRequest) -> TokenVectors:
        def embed(runtime: Runtime, texts: list[str]) -> list[Vectors]:
            return runtime.embed_tokens(texts, request)

        if self._runtime is not None:
            _check_size(request, self._runtime)
        found = self._in_pieces(request, embed)
        return TokenVectors(vectors=np.concatenate(found), counts=[len(one) for one in found])

    def _in_pieces(
        self,
        request: TokenizeRequest | SplitRequest | TokensRequest,
        step: Callable[[Runtime, list[str]], list[Tokenized]],
    ) -> list[Tokenized]:
        """Tokenize some of the texts at a time, so that the deadline is kept."""
        if self._runtime is None:
            raise Unavailable(self._status.reason, retry_after_seconds=1)
        found: list[Tokenized] = []
        for first in range(0, len(request.texts), TOKENIZE_PIECE_TEXTS):
            if time.monotonic() > request.deadline:
                raise DeadlineExceeded("the deadline passed before the texts were tokenized")
            try:
                found += step(self._runtime, request.texts[first : first + TOKENIZE_PIECE_TEXTS])
            except ServiceError as error:
                if error.index is not None:
                    error.index += first
                raise
            except Exception:
                log.exception("Tokenization failed")
                raise ModelFailure("the request could not be tokenized") from None
        return found

    def status(self) -> Status:
        return self._status

    def must_restart(self) -> bool:
        return self._status.state == "unhealthy"

    def running_seconds(self) -> float:
        """How long the current batch has been running; 0 if there is none."""
        since = self._batcher.running_since if self._batcher else None
        return time.monotonic() - since if since is not None else 0.0

    def close(self) -> None:
        self._closed = True
        self._set(Status(state="draining", reason="shutting down", info=self._status.info))
        if self._batcher is not None:
            self._batcher.close("the service is shutting down")
        if self._sampler is not None:
            self._sampler.close()

    def _load(self) -> None:
        try:
            runtime = self._runtime = self._load_runtime(self._settings)
            self._batcher = Batcher(
                runtime,
                max_queued_tokens=self._settings.max_queued_tokens,
                cache_bytes=self._settings.cache_mb << 20,
                on_device_lost=self._lost,
            )
            self._sampler = Sampler(self._queued_tokens, find_gpu(runtime.info.device))
            _publish(runtime.info)
            if not self._closed:
                self._set(Status(state="healthy", info=runtime.info))
            if self._closed:
                # While the model was loading, or just now.
                self.close()
        except StartupError as error:
            self._fail_to_start(error)
        except Exception as error:
            log.debug("Loading failed", exc_info=True)
            self._fail_to_start(StartupError(f"{type(error).__name__}: {error}"))
        finally:
            self.loaded.set()

    def _fail_to_start(self, error: StartupError) -> None:
        self.startup_error = error
        self._set(Status(state="unhealthy", reason=str(error)))

    def _lost(self, reason: str) -> None:
        log.critical("The device is lost: %s", reason)
        self._set(Status(state="unhealthy", reason=reason, info=self._status.info))

    def _queued_tokens(self) -> int:
        return self._batcher.queued_tokens if self._batcher else 0

    def _set(self, status: Status) -> None:
        self._status = status
        metrics.MODEL_READY.set(status.state == "healthy")
        self._on_status(status)


def _publish(info: ModelInfo) -> None:
    """Describe the loaded model in the metrics."""
    metrics.MODEL_INFO.labels(
        model=info.model_name,
        revision=info.revision or "",
        device=info.device,
        dtype=info.dtype,
        backend=info.backend,
        dimension=info.embedding_dimension,
        max_seq_length=info.max_seq_length,
        fingerprint=info.fingerprint,
    ).set(1)


def _load_model(settings: ModelSettings) -> Runtime:
    # Imported here: torch and sentence-transformers take seconds, and /health answers meanwhile.
    from embedding_service.inference.loading import load

    logs.adopt_libraries()
    return load(settings)


def _check_size(request: TokensRequest, runtime: Runtime) -> None:
    """Raises TooLarge if the vectors of all tokens could be too many numbers."""
    info = runtime.info
    # A token is at least a character or a byte of one, and two are special. Each text has the prompt too.
    prompt = len(runtime.prompt(request) or "")
    tokens = sum(min(info.max_seq_length, 4 * (prompt + len(text)) + 2) for text in request.texts)
    if tokens * info.embedding_dimension > MAX_NUMBERS:
        raise TooLarge(
            f"could have {tokens} tokens of {info.embedding_dimension} numbers each; at most "
            f"{MAX_NUMBERS} numbers are allowed, so send fewer texts",
            field="texts",
        )
