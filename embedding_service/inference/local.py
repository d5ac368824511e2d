"""LocalEngine: the model and its batcher in this process."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
from prometheus_client import Gauge

from embedding_service.engine import (
    GRACE_SECONDS,
    Answer,
    AnswerT,
    AnyRequest,
    DecodedTexts,
    DecodeRequest,
    Embeddings,
    EmbedRequest,
    ListTokensRequest,
    ModelInfo,
    Outcome,
    Receiver,
    Request,
    Status,
    TokenLists,
    TokenVectors,
    TokenVectorsRequest,
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
from embedding_service.inference.model import Model
from embedding_service.inference.sampling import Sampler, find_gpu
from embedding_service.observability import logs, metrics
from embedding_service.settings.config import Config

log = logging.getLogger(__name__)

# How many texts are tokenized before the deadline is checked again.
STEP_TEXTS = 64

FAILURES = {
    ListTokensRequest: "the tokens of the request could not be listed",
    DecodeRequest: "the token ids of the request could not be decoded",
    TokenVectorsRequest: "the vectors of the request's tokens could not be computed",
}

# An answer with vectors of tokens may hold this many numbers: about 40 MB of JSON.
MAX_NUMBERS = 4_000_000

Item = TypeVar("Item")


class LocalEngine:
    """Loads the model in a thread of its own; until it is there, `call` raises Unavailable."""

    def __init__(
        self,
        settings: Config,
        *,
        on_status: Callable[[Status], None] = lambda _status: None,
        load: Callable[[Config], Model] | None = None,
    ) -> None:
        self._settings = settings
        self._on_status = on_status
        self._load_with = load or _load_model
        self._batcher: Batcher | None = None
        self._sampler: Sampler | None = None
        self._model: Model | None = None
        self._ready: Gauge | None = None
        self._closed = False
        # Threads of their own: no kind of request delays another, nor those that go to the batcher directly.
        tokens = ThreadPoolExecutor(1, "tokens")
        self._threads = {
            ListTokensRequest: tokens,
            DecodeRequest: tokens,
            TokenVectorsRequest: ThreadPoolExecutor(1, "token vectors"),
        }
        self._status = Status(state="loading", reason=f"loading {settings.embedding_model}")
        self.startup_error: StartupError | None = None
        self.loaded = threading.Event()
        self._thread = threading.Thread(target=self._load, name="load", daemon=True)
        self._thread.start()

    def submit(
        self, calls: Sequence[tuple[int, AnyRequest]], receiver: Receiver, *, may_run: bool = False
    ) -> None:
        """Answer numbered requests that came together; `receiver` gets the outcome of each, once.

        It may be called from any thread, even this one, which also computes a single text if it `may_run`.
        """
        if self._batcher is None:
            error = Unavailable(self._status.reason, retry_after_seconds=1)
            receiver([(number, error) for number, _ in calls])
            return
        together: list[tuple[int, EmbedRequest]] = []
        for number, request in calls:
            if isinstance(request, EmbedRequest):
                together.append((number, request))
            else:
                self._threads[type(request)].submit(self._answer, number, request, receiver)
        if together:
            self._batcher.submit(together, receiver, may_run=may_run and len(calls) == 1)

    def cancel(self, receiver: Receiver) -> None:
        """Drop all requests of a receiver that is gone."""
        if self._batcher is not None:
            self._batcher.cancel(receiver)

    def call(self, request: Request[AnswerT]) -> AnswerT:
        return cast(AnswerT, self._call(cast(AnyRequest, request)))

    def _answer(self, number: int, request: AnyRequest, receiver: Receiver) -> None:
        try:
            outcome: Outcome = self._call(request)
        except ServiceError as error:
            outcome = error
        except Exception:
            log.exception("A request failed")
            outcome = ModelFailure("the service failed on this request")
        receiver([(number, outcome)])

    def _call(self, request: AnyRequest) -> Answer:
        model = self._model
        if model is None:
            raise Unavailable(self._status.reason, retry_after_seconds=1)
        if isinstance(request, ListTokensRequest):
            return TokenLists(
                _in_steps(request, lambda texts: model.lister.list(texts, request.add_special_tokens))
            )
        if isinstance(request, DecodeRequest):
            return DecodedTexts(
                _in_steps(request, lambda lists: model.lister.decode(lists, request.skip_special_tokens))
            )
        if isinstance(request, TokenVectorsRequest):
            _check_size(request, model)
            found = _in_steps(request, lambda texts: model.exact.embed_tokens(texts, model.prompt(request)))
            return TokenVectors(vectors=np.concatenate(found), counts=[len(one) for one in found])
        return self._embed(request)

    def _embed(self, request: EmbedRequest) -> Embeddings:
        if self._batcher is None:
            raise Unavailable(self._status.reason, retry_after_seconds=1)
        done = threading.Event()
        outcomes: list[tuple[int, Outcome]] = []

        def finish(together: Sequence[tuple[int, Outcome]]) -> None:
            outcomes.extend(together)
            done.set()

        self._batcher.submit([(0, request)], finish)
        if not done.wait(request.deadline - time.monotonic() + GRACE_SECONDS):
            self._batcher.cancel(finish)
            raise DeadlineExceeded("the model did not answer before the deadline")
        ((_, outcome),) = outcomes
        if isinstance(outcome, ServiceError):
            raise outcome
        return cast(Embeddings, outcome)

    def status(self) -> Status:
        return self._status

    def must_restart(self) -> bool:
        return self._status.state == "unhealthy"

    @property
    def running_since(self) -> float | None:
        """Start of the batch that has been running longest, on the monotonic clock; None without one."""
        return self._batcher.running_since if self._batcher else None

    def wait_loaded(self) -> ModelInfo:
        """The model's facts, once it is loaded. Raises StartupError."""
        self.loaded.wait()
        if self.startup_error is not None:
            raise self.startup_error
        if self._status.info is None:
            raise StartupError(self._status.reason)
        return self._status.info

    def rest(self) -> None:
        """Give memory back if nothing has run for a while; called from time to time."""
        if self._model is not None:
            self._model.rest()

    def close(self) -> None:
        self._closed = True
        self._set(Status(state="draining", reason="shutting down", info=self._status.info))
        if self._batcher is not None:
            self._batcher.close("the service is shutting down")
        if self._sampler is not None:
            self._sampler.close()

    def _load(self) -> None:
        try:
            model = self._model = self._load_with(self._settings)
            self._batcher = Batcher(
                model,
                max_queued_tokens=self._settings.max_queued_tokens,
                cache_bytes=self._settings.cache_mb << 20,
                on_device_lost=self._lost,
            )
            self._sampler = Sampler(self._batcher, find_gpu(model.info.device))
            _publish(model.info)
            self._ready = metrics.describe_process(self._settings.process, model.info.device)
            if not self._closed:
                self._set(Status(state="healthy", info=model.info))
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

    def _set(self, status: Status) -> None:
        self._status = status
        metrics.MODEL_READY.set(status.state == "healthy")
        if self._ready is not None:
            self._ready.set(status.state == "healthy")
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


def _load_model(settings: Config) -> Model:
    # Imported here: torch and sentence-transformers take seconds, and /health answers meanwhile.
    from embedding_service.inference.loading import load

    logs.adopt_libraries()
    return load(settings)


def _check_size(request: TokenVectorsRequest, model: Model) -> None:
    """Raises TooLarge if the vectors of all tokens could be too many numbers."""
    info = model.info
    # A token is at least a character or a byte of one, and two are special. Each text has the prompt too.
    prompt = len(model.prompt(request) or "")
    tokens = sum(min(info.max_seq_length, 4 * (prompt + len(text)) + 2) for text in request.texts)
    if tokens * info.embedding_dimension > MAX_NUMBERS:
        raise TooLarge(
            f"could have {tokens} tokens of {info.embedding_dimension} numbers each; at most "
            f"{MAX_NUMBERS} numbers are allowed, so send fewer texts",
            field="texts",
        )


def _in_steps(request: Request[AnswerT], step: Callable[[Sequence[Any]], list[Item]]) -> list[Item]:
    """The results for some of the texts at a time, so that the deadline is kept."""
    items: list[Item] = []
    for first in range(0, len(request.texts), STEP_TEXTS):
        if time.monotonic() > request.deadline:
            raise DeadlineExceeded("the deadline passed before all texts were read")
        try:
            items += step(request.texts[first : first + STEP_TEXTS])
        except ServiceError as error:
            if error.index is not None:
                error.index += first
            raise
        except Exception:
            log.exception("A request failed")
            raise ModelFailure(FAILURES[type(request)]) from None
    return items
