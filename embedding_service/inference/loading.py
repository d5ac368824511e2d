"""From settings to a model that is ready to run: find, load, convert, check, warm up."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from embedding_service.engine import Int8Ranges, ModelInfo
from embedding_service.inference.backends import Backend
from embedding_service.inference.backends.choice import choose_backend, convert
from embedding_service.inference.checkpoint import Checkpoint, read_checkpoint
from embedding_service.inference.cores import available_cores
from embedding_service.inference.cost_cache import CostCache
from embedding_service.inference.device import computes_bfloat16, device_name, prepare_libraries
from embedding_service.inference.fingerprint import with_ranges
from embedding_service.inference.in_torch import InTorch
from embedding_service.inference.lanes import SessionLane
from embedding_service.inference.model import Model
from embedding_service.inference.own_preprocessing import choose_preprocessor
from embedding_service.inference.preprocessing import Preprocessor
from embedding_service.inference.settings import ModelSettings
from embedding_service.inference.warm_up import WarmUp, find_cost, warm_up
from embedding_service.quantization import read_ranges_of

log = logging.getLogger(__name__)

# Another number format is recommended if it is at least this many times as fast.
MIN_REPORTED_SPEEDUP = 1.1

# How far the vectors of one text may differ with the batch, as a share of the largest number, if not 0.001.
EXACTNESS = {"float16": 0.05, "bfloat16": 0.05, "int8": 0.05}


def load(settings: ModelSettings) -> Model:
    """Find, load, check and warm up a model. Raises StartupError with a line that says what to do."""
    began = time.monotonic()
    threads = max(1, available_cores() // settings.model_processes)
    checkpoint = read_checkpoint(settings)
    ranges = None
    if settings.int8_ranges:
        ranges = read_ranges_of(Path(settings.int8_ranges).expanduser(), checkpoint.fingerprint)
    prepare_libraries(checkpoint.device, threads)
    preprocessor = choose_preprocessor(
        checkpoint.model,
        checkpoint.max_seq_length,
        with_prompts=checkpoint.prompts.values(),
        # Beside an accelerator every call already uses the tokenizer's own threads.
        threads=threads if checkpoint.on_cpu else 1,
    )
    backend = choose_backend(checkpoint, preprocessor, settings, threads=threads)
    model = _assemble(settings, checkpoint, preprocessor, backend, ranges)
    log.info(
        "Loaded %s (%s) on %s: %s, %s, %d dimensions, %d tokens, threads: %d, batches of %d tokens "
        "(%.0f ms), in %.1f s",
        settings.embedding_model,
        checkpoint.source.origin,
        checkpoint.device,
        backend.name,
        checkpoint.dtype,
        model.info.embedding_dimension,
        model.info.max_seq_length,
        threads,
        model.budget.tokens,
        model.budget.batch_seconds * 1e3,
        time.monotonic() - began,
    )
    if settings.dtype in ("auto", "bfloat16") and settings.cache_folder and backend.name == "openvino":
        _compare_formats(settings, checkpoint, model, backend, threads)
    return model


def _compare_formats(
    settings: ModelSettings, checkpoint: Checkpoint, model: Model, backend: Backend, threads: int
) -> None:
    """Say in the log whether the other of float32 and bfloat16 is faster; measured at the first start."""
    kept = _costs(settings, checkpoint, backend)
    # Without a cache every start would have to measure it.
    if kept is None or kept.load() is None or not computes_bfloat16(checkpoint.device, settings.backend):
        return
    own, other = ("float32", "bfloat16") if checkpoint.dtype == "float32" else ("bfloat16", "float32")
    in_other = replace(checkpoint, dtype=other)
    costs = _costs(settings, in_other, backend)
    cost = costs.load() if costs else None
    if cost is None:
        try:
            sessions = convert(in_other, model.preprocessor, settings, threads=threads).sessions
        except Exception as error:
            log.debug("%s cannot be compared with %s: %s", other, own, error)
            return
        lanes = [SessionLane(model.preprocessor, session) for session in sessions]
        cost = find_cost(
            lanes,
            model.preprocessor,
            model.info.max_seq_length,
            model.info.max_batch_tokens,
            costs,
            on_cpu=True,
        )
    gain = model.budget.batch_seconds / cost.seconds(model.budget.tokens)
    if gain > MIN_REPORTED_SPEEDUP:
        log.info("DTYPE=%s would be about %.1f times as fast as %s on this CPU", other, gain, own)
    elif other == "bfloat16":
        log.info("DTYPE=bfloat16 would be no faster on this CPU: %.1f times as fast as float32", gain)


def _assemble(
    settings: ModelSettings,
    checkpoint: Checkpoint,
    preprocessor: Preprocessor,
    backend: Backend,
    ranges: Int8Ranges | None,
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
        costs=_costs(settings, checkpoint, backend),
        tolerance=EXACTNESS.get(checkpoint.dtype, 1e-3),
    )

    return Model(
        info=_info(settings, checkpoint, backend, warm, ranges),
        preprocessor=preprocessor,
        lanes=lanes,
        whole=whole,
        exact=InTorch(lambda: checkpoint, preprocessor),
        budget=warm.budget,
        normalized=checkpoint.normalized,
        on_cpu=checkpoint.on_cpu,
    )


def _info(
    settings: ModelSettings, checkpoint: Checkpoint, backend: Backend, warm: WarmUp, ranges: Int8Ranges | None
) -> ModelInfo:
    weights = list(checkpoint.model.parameters())
    transformer = getattr(checkpoint.model[0], "auto_model", None)
    return ModelInfo(
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
        fingerprint=with_ranges(checkpoint.fingerprint, ranges) if ranges else checkpoint.fingerprint,
        int8_ranges=ranges,
        reads_whole_texts=checkpoint.reads_whole_texts,
        default_prompt_name=checkpoint.model.default_prompt_name,
        architecture=transformer.config.model_type if transformer is not None else "static",
        parameters=sum(each.numel() for each in weights),
        size_bytes=sum(each.nbytes for each in weights),
    )


def _costs(settings: ModelSettings, checkpoint: Checkpoint, backend: Backend) -> CostCache | None:
    if not settings.cache_folder:
        return None
    facts = [
        checkpoint.fingerprint,
        settings.batch_size,
        settings.attn_implementation,
        backend.name,
        backend.version,
        len(backend.sessions),
        torch.get_num_threads(),
        device_name(checkpoint.device),
        torch.__version__,
        transformers.__version__,
    ]
    return CostCache(settings.cache_folder, facts)
