"""From settings to a model that is ready to run, without torch if the model has been prepared."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from embedding_service.errors import StartupError
from embedding_service.inference import prepared
from embedding_service.inference.backends import Backend
from embedding_service.inference.budget import BatchBudget, BatchCost
from embedding_service.inference.cores import available_cores
from embedding_service.inference.fingerprint import with_ranges
from embedding_service.inference.hardware import (
    can_run_openvino,
    computes_bfloat16,
    no_cuda,
    share_cores,
)
from embedding_service.inference.in_torch import InTorch
from embedding_service.inference.memory import WEIGHTS, release
from embedding_service.inference.model import Model
from embedding_service.inference.prepared import TOLERANCE, Prepared, Reference
from embedding_service.inference.preprocessing import RustTokenizer
from embedding_service.inference.source import resolve
from embedding_service.inference.streams import SessionStream
from embedding_service.inference.warm_up import batch_of, forward_at_once, short_and_long
from embedding_service.quantization import read_ranges
from embedding_service.settings.config import Config

if TYPE_CHECKING:
    from embedding_service.inference.checkpoint import Checkpoint

log = logging.getLogger(__name__)


def load(settings: Config) -> Model:
    """Find, load, check and warm up a model. Raises StartupError with a line that says what to do."""
    began = time.monotonic()
    threads = max(1, available_cores() // settings.model_processes)
    model = _load_prepared(settings, threads) or _load_fully(settings, threads)
    _add_ranges(model, settings)
    info = model.info
    log.info(
        "Loaded %s (%s) on %s: %s, %s, %d dimensions, %d tokens, threads: %d, batches of %d tokens "
        "(%.0f ms), in %.1f s",
        info.model_name,
        info.origin,
        info.device,
        info.backend,
        info.dtype,
        info.embedding_dimension,
        info.max_seq_length,
        threads,
        model.budget.tokens,
        model.budget.batch_seconds * 1e3,
        time.monotonic() - began,
    )
    return model


def prepare(settings: Config) -> bool:
    """Prepare a model for later starts; False if it cannot be, as for CUDA. Raises StartupError."""
    if not _may_be_prepared(settings):
        return False
    load(settings)
    source = resolve(settings.embedding_model, settings.model_revision)
    return prepared.read(prepared.keys_of(settings, source).prepared()) is not None


def _load_fully(settings: Config, threads: int) -> Model:
    if not prepared.can_prepare():
        raise StartupError(
            "EMBEDDING_MODEL has not been prepared with these settings and files, and torch, which prepares "
            "it, is not installed: run `embedding-service download` where it is, with the same settings"
        )
    if _may_be_prepared(settings):
        log.info("Preparing %s, once; later starts take seconds", settings.embedding_model)
    from embedding_service.inference.full_start import load_fully

    source = resolve(settings.embedding_model, settings.model_revision)
    return load_fully(settings, source, prepared.keys_of(settings, source), threads)


def _add_ranges(model: Model, settings: Config) -> None:
    if settings.int8_ranges:
        fingerprint = model.info.fingerprint
        ranges = read_ranges(settings.int8_ranges, fingerprint)
        model.info = msgspec.structs.replace(
            model.info, fingerprint=with_ranges(fingerprint, ranges), int8_ranges=ranges
        )


# A prepared model


def _may_be_prepared(settings: Config) -> bool:
    # Only torch can tell whether there is a CUDA device if the driver is installed.
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and no_cuda() is not None)
    possible = on_cpu and settings.backend in ("auto", "openvino") and can_run_openvino()
    return possible and bool(settings.cache_folder)


def _load_prepared(settings: Config, threads: int) -> Model | None:
    """The model as it was prepared; None if it has not been, or not for this machine."""
    if not _may_be_prepared(settings):
        return None
    source = resolve(settings.embedding_model, settings.model_revision, verified=False)
    with ThreadPoolExecutor(2) as pool:
        hashing = pool.submit(prepared.keys_of, settings, source)
        from embedding_service.inference.backends.openvino import openvino_backend, read_graph

        keys = hashing.result()
        read = prepared.read(keys.prepared())
        if read is None:
            return None
        facts, references = read
        dtype = facts.info.dtype
        if dtype == "bfloat16" and not computes_bfloat16("cpu", settings.backend):
            return None
        share_cores(on_cpu=True)
        graph = keys.graph(dtype)
        # Weights that are damaged harm nothing but vectors, so they are hashed while they are compiled.
        if (folder := graph.find(unread=WEIGHTS)) is None:
            return None
        is_sound = pool.submit(graph.is_sound)
        reading = pool.submit(RustTokenizer, facts.tokenizer, threads)
        try:
            backend = openvino_backend(read_graph(folder), dtype=dtype, threads=threads)
            preprocessor = reading.result()
            reason = _disagreement(preprocessor, backend, references, dtype)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
        if not is_sound.result():
            reason = "its weights are damaged"
    if reason is not None:
        log.warning("The prepared model is not used and is prepared again: %s", reason)
        keys.prepared().forget()
        graph.forget()
        return None
    cost = prepared.read_cost(keys.cost("openvino", dtype, len(backend.sessions), threads, "cpu"))
    info = msgspec.structs.replace(
        facts.info, model_name=settings.embedding_model, origin=source.origin, revision=source.revision
    )
    facts = msgspec.structs.replace(facts, info=info)

    def read_in_torch() -> "Checkpoint":
        from embedding_service.inference import full_start

        return full_start.read_in_torch(settings, source, keys, threads)

    model = _assemble(facts, cost or facts.cost, preprocessor, backend, read_in_torch)
    release()
    return model


def _disagreement(
    preprocessor: RustTokenizer, backend: Backend, references: list[Reference], dtype: str
) -> str | None:
    """How the model differs from what sentence-transformers gave; None if it does not."""
    if not prepared.same_inputs(preprocessor, references):
        return "its tokens differ from those of sentence-transformers"
    found = prepared.difference(backend.sessions[0], references)
    # Not a number is a difference, too.
    return None if found <= TOLERANCE[dtype] else f"its vectors differ by {found:.2g}"


def _assemble(
    facts: Prepared,
    cost: BatchCost,
    preprocessor: RustTokenizer,
    backend: Backend,
    read_in_torch: "Callable[[], Checkpoint]",
) -> Model:
    info = facts.info
    budget = BatchBudget(cost, max_seq_length=info.max_seq_length, max_batch_tokens=info.max_batch_tokens)
    streams = [SessionStream(preprocessor, session) for session in backend.sessions]
    all_cores = SessionStream(preprocessor, backend.all_cores) if backend.all_cores else None
    for stream in [*streams, *([all_cores] if all_cores else [])]:
        stream.without_padding = facts.without_padding
    short, _ = short_and_long(preprocessor, info.max_seq_length)
    forward_at_once(streams, batch_of(short, 1))

    return Model(
        info=info,
        preprocessor=preprocessor,
        streams=streams,
        all_cores=all_cores,
        exact=InTorch(read_in_torch, preprocessor),
        budget=budget,
        normalized=facts.normalized,
        on_cpu=True,
        rest=backend.rest,
    )
