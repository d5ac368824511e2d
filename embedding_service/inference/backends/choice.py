"""Which backend runs the model: OpenVINO if it can and agrees with torch, else torch."""

import importlib.util
import logging
from collections.abc import Sequence
from textwrap import shorten

import torch

from embedding_service.errors import StartupError
from embedding_service.inference.backends import Backend
from embedding_service.inference.backends.torch import torch_backend
from embedding_service.inference.checkpoint import Checkpoint
from embedding_service.inference.hardware import can_run_openvino
from embedding_service.inference.prepared import TOLERANCE, Keys, Reference, difference
from embedding_service.inference.preprocessing import PROBES, Preprocessor

log = logging.getLogger(__name__)

NOT_KEPT = "CACHE_FOLDER cannot be written, so every start converts the model again"

# In place of a graph: why the model cannot be converted.
REFUSAL = "refusal.txt"


def choose_backend(
    checkpoint: Checkpoint,
    preprocessor: Preprocessor,
    references: Sequence[Reference],
    keys: Keys,
    *,
    threads: int,
) -> Backend:
    """What BACKEND asks for, or the faster one. Raises StartupError if BACKEND cannot be used."""
    settings = checkpoint.settings
    wanted, int8 = settings.backend, checkpoint.dtype == "int8"
    installed = importlib.util.find_spec("openvino") is not None
    exact = checkpoint.model.dtype in (None, torch.float32) and checkpoint.dtype in TOLERANCE
    possible = checkpoint.on_cpu and exact and preprocessor.makes_arrays
    if int8 and (wanted == "torch" or not (possible and installed)):
        raise StartupError("DTYPE=int8 needs OpenVINO, DEVICE=cpu and a transformer with a fast tokenizer")
    if wanted == "openvino" and not possible:
        raise StartupError(
            "BACKEND=openvino needs DEVICE=cpu, DTYPE=float32, int8 or, if the CPU has avx512_bf16 or AMX, "
            "bfloat16, and a transformer with a fast tokenizer"
        )
    asked = wanted == "openvino" or int8
    if not asked and (wanted == "torch" or not (possible and can_run_openvino())):
        return _in_torch(checkpoint, threads)
    try:
        return convert(checkpoint, references, keys, threads=threads)
    except ModuleNotFoundError as error:
        if int8 and error.name == "nncf":
            raise StartupError("DTYPE=int8 needs nncf: pip install nncf") from None
        raise StartupError(f"BACKEND=openvino: {error}; pip install openvino") from None
    except Exception as error:
        if asked:
            line = shorten(str(error), 300, placeholder=" …")
            raise StartupError(f"OpenVINO cannot run this model: {line}") from error
        log.warning("OpenVINO cannot run this model, using torch: %s", error)
        return _in_torch(checkpoint, threads)


def _in_torch(checkpoint: Checkpoint, threads: int) -> Backend:
    if checkpoint.on_cpu and checkpoint.dtype == "bfloat16":
        checkpoint.model.to(torch.bfloat16)
        log.info("bfloat16 runs in torch; without avx512_bf16 or AMX in the CPU, float32 is faster")
    return torch_backend(checkpoint.model, threads)


def convert(checkpoint: Checkpoint, references: Sequence[Reference], keys: Keys, *, threads: int) -> Backend:
    """The model in OpenVINO, converted unless it has been. Raises if its vectors differ from torch's."""
    from embedding_service.inference.backends import openvino
    from embedding_service.inference.backends.conversion import convert

    dtype, entry = checkpoint.dtype, keys.graph(checkpoint.dtype)
    folder = entry.find()
    if folder is not None and (refusal := folder / REFUSAL).is_file():
        raise ValueError(refusal.read_text("utf-8"))
    if folder is not None:
        try:
            backend = openvino.openvino_backend(openvino.read_graph(folder), dtype=dtype, threads=threads)
            if difference(backend.sessions[0], references) <= TOLERANCE[dtype]:
                return backend
        except RuntimeError as error:
            log.debug("The converted model in %s is not used: %s", folder, error)
    entry.forget()
    try:
        graph = convert(checkpoint.model, checkpoint.model.preprocess(PROBES[:2]), int8=dtype == "int8")
        if entry.keep(lambda path: openvino.write_graph(graph, path), NOT_KEPT, logging.WARNING):
            graph = openvino.read_graph(entry.path)
        backend = openvino.openvino_backend(graph, dtype=dtype, threads=threads)
        found = difference(backend.sessions[0], references)
        if not found <= TOLERANCE[dtype]:
            raise ValueError(f"its vectors differ from torch's by {found:.2g}")
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:
        # bfloat16 has the graph of float32, which may be exact enough.
        if dtype != "bfloat16":
            line = shorten(str(error), 300, placeholder=" …").encode()
            entry.forget()
            entry.keep(lambda path: (path / REFUSAL).write_bytes(line), NOT_KEPT, logging.WARNING)
        raise
    return backend
