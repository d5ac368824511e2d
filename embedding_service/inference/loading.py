"""From settings to a model that is ready to run: find, load, convert, check, warm up."""

import logging
import time

from embedding_service.engine import ModelInfo
from embedding_service.inference.backends import Backend
from embedding_service.inference.backends.choice import choose_backend
from embedding_service.inference.backends.torch import open_session
from embedding_service.inference.checkpoint import Checkpoint, read_checkpoint
from embedding_service.inference.cores import available_cores
from embedding_service.inference.device import prepare_libraries
from embedding_service.inference.lanes import SessionLane
from embedding_service.inference.model import Model
from embedding_service.inference.preprocessing import Preprocessor, choose_preprocessor
from embedding_service.inference.settings import ModelSettings
from embedding_service.inference.warm_up import warm_up

log = logging.getLogger(__name__)


def load(settings: ModelSettings) -> Model:
    """Find, load, check and warm up a model. Raises StartupError with a line a person can act on."""
    began = time.monotonic()
    threads = max(1, available_cores() // settings.model_processes)
    checkpoint = read_checkpoint(settings)
    prepare_libraries(checkpoint.device, threads)
    preprocessor = choose_preprocessor(
        checkpoint.model,
        checkpoint.max_seq_length,
        with_prompts=checkpoint.prompts.values(),
        # Beside an accelerator every call already uses the tokenizer's own threads.
        threads=threads if checkpoint.on_cpu else 1,
    )
    backend = choose_backend(checkpoint, preprocessor, settings, threads=threads)
    model = _assemble(settings, checkpoint, preprocessor, backend)
    log.info(
        "Loaded %s (%s) on %s: %s, %s, %d dimensions, %d tokens, threads: %d, in %.1f s",
        settings.embedding_model,
        checkpoint.source.origin,
        checkpoint.device,
        backend.name,
        checkpoint.dtype,
        model.info.embedding_dimension,
        model.max_seq_length,
        threads,
        time.monotonic() - began,
    )
    return model


def _assemble(
    settings: ModelSettings, checkpoint: Checkpoint, preprocessor: Preprocessor, backend: Backend
) -> Model:
    lanes = [SessionLane(preprocessor, session) for session in backend.sessions]
    whole = SessionLane(preprocessor, backend.whole) if backend.whole else None
    warm = warm_up(
        lanes,
        whole,
        preprocessor,
        max_seq_length=checkpoint.max_seq_length,
        max_batch_tokens=settings.batch_size * checkpoint.max_seq_length,
        on_cpu=checkpoint.on_cpu,
    )

    def open_exact_lane() -> SessionLane:
        exact = checkpoint.in_float32()
        return SessionLane(preprocessor.for_copy(exact), open_session(exact))

    return Model(
        sentence_transformer=checkpoint.model,
        preprocessor=preprocessor,
        lanes=list(lanes),
        whole=whole,
        open_exact_lane=open_exact_lane,
        max_seq_length=checkpoint.max_seq_length,
        max_batch_tokens=warm.max_batch_tokens,
        budget=warm.budget,
        separate_bulk=checkpoint.on_cpu,
        normalized=checkpoint.normalized,
        uses_accelerator=not checkpoint.on_cpu,
        info=ModelInfo(
            model_name=settings.embedding_model,
            origin=checkpoint.source.origin,
            revision=checkpoint.source.revision,
            embedding_dimension=warm.dimension,
            max_seq_length=checkpoint.max_seq_length,
            device=checkpoint.device,
            dtype=checkpoint.dtype,
            backend=backend.name,
            pooling=checkpoint.pooling,
            prompts=checkpoint.prompts,
            batch_size=settings.batch_size,
            max_batch_tokens=warm.max_batch_tokens,
            fingerprint=checkpoint.fingerprint,
        ),
    )
