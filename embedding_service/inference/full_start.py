"""A full start: read the model with torch, convert and check it, and prepare it for the next starts."""

import dataclasses
import logging
import threading
from dataclasses import replace

from sentence_transformers.base.modules import Transformer

from embedding_service.engine import ModelInfo
from embedding_service.errors import ModelFailure
from embedding_service.inference import prepared
from embedding_service.inference.backends import Backend
from embedding_service.inference.backends.choice import choose_backend, convert
from embedding_service.inference.backends.torch import TorchSession
from embedding_service.inference.checkpoint import Checkpoint, find_pooling, length_limit, read_checkpoint
from embedding_service.inference.device import device_name, prepare_libraries
from embedding_service.inference.fingerprint import fingerprint, model_digest
from embedding_service.inference.hardware import computes_bfloat16, share_cores
from embedding_service.inference.in_torch import InTorch
from embedding_service.inference.model import Model
from embedding_service.inference.own_preprocessing import choose_preprocessor
from embedding_service.inference.prepared import Keys, Prepared, Reference, inputs_of
from embedding_service.inference.preprocessing import Preprocessor, RustTokenizer
from embedding_service.inference.source import Source
from embedding_service.inference.store import Entry
from embedding_service.inference.streams import SessionStream
from embedding_service.inference.tokenized import Rows
from embedding_service.inference.warm_up import WarmUp, find_cost, medium, warm_up
from embedding_service.settings.config import Config

log = logging.getLogger(__name__)

# Another number format is recommended if it is at least this many times as fast.
MIN_REPORTED_SPEEDUP = 1.1


# How far the vectors of one text may differ with the batch, as a share of the largest number, if not 0.001.
EXACTNESS = {"float16": 0.05, "bfloat16": 0.05, "int8": 0.05}


def load_fully(settings: Config, source: Source, keys: Keys, threads: int) -> Model:
    """Load and check a model with torch, and prepare it if it then needs none. Raises StartupError."""
    checkpoint = read_checkpoint(settings, source, keys.digest)
    share_cores(checkpoint.on_cpu)
    prepare_libraries(checkpoint.device, threads, settings.device_processes)
    prompts = ["", *dict.fromkeys(filter(None, checkpoint.prompts.values()))]
    preprocessor = choose_preprocessor(
        checkpoint.model,
        checkpoint.max_seq_length,
        prompts=prompts,
        # Beside an accelerator every call already uses the tokenizer's own threads.
        threads=threads if checkpoint.on_cpu else 1,
    )
    references = _references(checkpoint, preprocessor, prompts) if checkpoint.on_cpu else []
    backend = choose_backend(checkpoint, preprocessor, references, keys, threads=threads)
    model = _assemble(checkpoint, preprocessor, backend, keys, threads)
    if backend.name == "openvino":
        assert isinstance(preprocessor, RustTokenizer)
        facts = Prepared(
            info=model.info,
            normalized=model.normalized,
            tokenizer=preprocessor.facts,
            prompts=prompts,
            without_padding=any(
                isinstance(stream, SessionStream) and stream.without_padding for stream in model.streams
            ),
            cost=model.budget.cost,
        )
        prepared.save(keys.prepared(), facts, references)
        if settings.dtype in ("auto", "bfloat16") and settings.cache_folder:
            threading.Thread(
                target=compare_formats,
                args=(checkpoint, model, references, keys, threads),
                name="formats",
                daemon=True,
            ).start()
    return model


def read_in_torch(settings: Config, source: Source, keys: Keys, threads: int) -> Checkpoint:
    """The model of a prepared start in torch, on the CPU. Raises StartupError or ModelFailure."""
    if model_digest(source.folder) != keys.digest:
        raise ModelFailure("the model's files have changed since the service started")
    checkpoint = read_checkpoint(dataclasses.replace(settings, device="cpu"), source, keys.digest)
    prepare_libraries("cpu", threads)
    return checkpoint


def _references(checkpoint: Checkpoint, preprocessor: Preprocessor, prompts: list[str]) -> list[Reference]:
    if not preprocessor.makes_arrays:
        return []
    inputs = [inputs_of(preprocessor, prompt) for prompt in prompts]
    session = TorchSession(checkpoint.model)
    return [
        Reference(prompt, given, session.run(dict(given)))
        for prompt, given in zip(prompts, inputs, strict=True)
    ]


def _assemble(
    checkpoint: Checkpoint, preprocessor: Preprocessor, backend: Backend, keys: Keys, threads: int
) -> Model:
    settings, source = checkpoint.settings, checkpoint.source
    streams = [SessionStream(preprocessor, session, pads=backend.pads) for session in backend.sessions]
    all_cores = SessionStream(preprocessor, backend.all_cores) if backend.all_cores else None
    warm = warm_up(
        streams,
        all_cores,
        preprocessor,
        max_seq_length=checkpoint.max_seq_length,
        max_batch_tokens=settings.batch_size * checkpoint.max_seq_length,
        on_cpu=checkpoint.on_cpu,
        costs=_cost_entry(keys, checkpoint, backend, threads),
        tolerance=EXACTNESS.get(checkpoint.dtype, 1e-3),
    )
    if isinstance(preprocessor, RustTokenizer):
        example = preprocessor.pack_unpadded([Rows.all_of(medium(preprocessor, checkpoint.max_seq_length))])
        backend.record(example, checkpoint.max_seq_length, warm.max_batch_tokens)
    in_torch = checkpoint if backend.name == "torch" else None

    def read() -> Checkpoint:
        # OpenVINO needs torch's copy no longer.
        return in_torch or read_in_torch(settings, source, keys, threads)

    return Model(
        info=_info(checkpoint, backend, warm),
        preprocessor=preprocessor,
        streams=streams,
        all_cores=all_cores,
        exact=InTorch(read, preprocessor),
        budget=warm.budget,
        normalized=checkpoint.normalized,
        on_cpu=checkpoint.on_cpu,
        rest=backend.rest,
    )


def _info(checkpoint: Checkpoint, backend: Backend, warm: WarmUp) -> ModelInfo:
    settings, model = checkpoint.settings, checkpoint.model
    weights = list(model.parameters())
    network = getattr(model[0], "auto_model", None)
    pooling = find_pooling(model)
    mode = pooling.pooling_mode if pooling is not None else "none"
    return ModelInfo(
        model_name=settings.embedding_model,
        origin=checkpoint.source.origin,
        revision=checkpoint.source.revision,
        embedding_dimension=warm.dimension,
        max_seq_length=checkpoint.max_seq_length,
        device=checkpoint.device,
        dtype=checkpoint.dtype,
        backend=backend.name,
        pooling=mode if isinstance(mode, str) else "+".join(mode),
        prompts=checkpoint.prompts,
        batch_size=settings.batch_size,
        max_batch_tokens=warm.max_batch_tokens,
        fingerprint=fingerprint(
            checkpoint.source.folder,
            dtype=checkpoint.dtype,
            max_seq_length=settings.max_seq_length,
            prompts=settings.prompts,
            default_prompt_name=settings.default_prompt_name,
            digest=checkpoint.digest,
        ),
        # As static embedding models do.
        reads_whole_texts=length_limit(model) is None and not isinstance(model[0], Transformer),
        default_prompt_name=model.default_prompt_name,
        architecture=network.config.model_type if network is not None else "static",
        parameters=sum(each.numel() for each in weights),
        size_bytes=sum(each.nbytes for each in weights),
    )


def _cost_entry(keys: Keys, checkpoint: Checkpoint, backend: Backend, threads: int) -> Entry:
    sessions = len(backend.sessions)
    return keys.cost(backend.name, checkpoint.dtype, sessions, threads, device_name(checkpoint.device))


def compare_formats(
    checkpoint: Checkpoint, model: Model, references: list[Reference], keys: Keys, threads: int
) -> None:
    """Say in the log whether the other of float32 and bfloat16 is faster; measured after a full start."""
    if not computes_bfloat16(checkpoint.device, checkpoint.settings.backend):
        return
    own, other = ("float32", "bfloat16") if checkpoint.dtype == "float32" else ("bfloat16", "float32")
    in_other = replace(checkpoint, dtype=other)
    try:
        backend = convert(in_other, references, keys, threads=threads)
    except Exception as error:
        log.debug("%s cannot be compared with %s: %s", other, own, error)
        return
    cost = find_cost(
        [SessionStream(model.preprocessor, session) for session in backend.sessions],
        model.preprocessor,
        model.info.max_seq_length,
        model.info.max_batch_tokens,
        _cost_entry(keys, in_other, backend, threads),
        on_cpu=True,
    )
    gain = model.budget.batch_seconds / cost.seconds(model.budget.tokens)
    if gain > MIN_REPORTED_SPEEDUP:
        log.info("DTYPE=%s would be about %.1f times as fast as %s on this CPU", other, gain, own)
    elif other == "bfloat16":
        log.info("DTYPE=bfloat16 would be no faster on this CPU: %.1f times as fast as float32", gain)
