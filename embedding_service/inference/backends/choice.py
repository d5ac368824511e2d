"""Which backend runs the model: OpenVINO if it can and agrees with torch, else torch."""

import importlib.util
import logging
import platform
from textwrap import shorten

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer

from embedding_service.errors import StartupError
from embedding_service.inference.backends import Backend, Session
from embedding_service.inference.backends.torch import TorchSession, torch_backend
from embedding_service.inference.checkpoint import Checkpoint
from embedding_service.inference.preprocessing import PROBES, Preprocessor
from embedding_service.inference.settings import ModelSettings
from embedding_service.inference.tokenized import Rows

log = logging.getLogger(__name__)

# How far a converted model may be from torch, as a share of the largest number in the vectors.
# bfloat16 has three digits, which the layers of a model add up.
CONVERSION_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.3}


def choose_backend(
    checkpoint: Checkpoint, preprocessor: Preprocessor, settings: ModelSettings, *, threads: int
) -> Backend:
    """What BACKEND asks for, or the faster one. Raises StartupError if BACKEND cannot be used."""
    wanted, int8 = settings.backend, checkpoint.dtype == "int8"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    installed = importlib.util.find_spec("openvino") is not None
    exact = checkpoint.model.dtype in (None, torch.float32) and checkpoint.dtype in CONVERSION_TOLERANCE
    possible = checkpoint.on_cpu and exact and preprocessor.makes_arrays
    if int8 and (wanted == "torch" or not (possible and installed)):
        raise StartupError("DTYPE=int8 needs OpenVINO, DEVICE=cpu and a transformer with a fast tokenizer")
    if wanted == "openvino" and not possible:
        raise StartupError(
            "BACKEND=openvino needs DEVICE=cpu, DTYPE=float32, int8 or, if the CPU has avx512_bf16 or AMX, "
            "bfloat16, and a transformer with a fast tokenizer"
        )
    asked = wanted == "openvino" or int8
    if not asked and (wanted == "torch" or not (possible and installed and x86)):
        return _in_torch(checkpoint)
    try:
        return convert(checkpoint, preprocessor, settings, threads=threads)
    except ModuleNotFoundError as error:
        if int8 and error.name == "nncf":
            raise StartupError("DTYPE=int8 needs nncf: pip install nncf") from None
        raise StartupError(f"BACKEND=openvino: {error}; pip install openvino") from None
    except Exception as error:
        if asked:
            line = shorten(str(error), 300, placeholder=" …")
            raise StartupError(f"OpenVINO cannot run this model: {line}") from error
        log.warning("OpenVINO cannot run this model, using torch: %s", error)
        return _in_torch(checkpoint)


def _in_torch(checkpoint: Checkpoint) -> Backend:
    if checkpoint.on_cpu and checkpoint.dtype == "bfloat16":
        checkpoint.model.to(torch.bfloat16)
        log.info("bfloat16 runs in torch; without avx512_bf16 or AMX in the CPU, float32 is faster")
    return torch_backend(checkpoint.model)


def convert(
    checkpoint: Checkpoint, preprocessor: Preprocessor, settings: ModelSettings, *, threads: int
) -> Backend:
    """The model in OpenVINO, from the cache if it is there. Raises if its vectors differ from torch's."""
    import openvino

    from embedding_service.inference.backends.graph_cache import GraphCache
    from embedding_service.inference.backends.openvino import GRAPH_FORM, load_graph, openvino_backend

    model, dtype, cache = checkpoint.model, checkpoint.dtype, None
    if settings.cache_folder:
        versions = [GRAPH_FORM, openvino.__version__, torch.__version__, transformers.__version__]
        # bfloat16 is computed from the graph of float32.
        form = "int8" if dtype == "int8" else "float32"
        attention = str(settings.attn_implementation)
        facts = [checkpoint.digest, form, attention, *versions]
        cache = GraphCache(settings.cache_folder, "\n".join(facts))
    example = model.preprocess(PROBES[:2])
    while True:
        graph, cached = load_graph(model, example, dtype=dtype, cache=cache)
        backend = openvino_backend(graph, model, example, dtype=dtype, threads=threads)
        difference = _difference(model, preprocessor, backend.sessions[0])
        if difference <= CONVERSION_TOLERANCE[dtype]:
            return backend
        if cache is None or not cached:
            raise ValueError(f"its vectors differ from torch's by {difference:.2g}")
        cache.forget()
        cache = None


def _difference(model: SentenceTransformer, preprocessor: Preprocessor, session: Session) -> float:
    """How far a session is from torch, as a share of the largest number, on texts of all lengths."""
    batch = [Rows.all_of(preprocessor.prepare(PROBES, None, None, None, parallel=False))]
    expected = TorchSession(model).run(preprocessor.pack(batch))
    got = session.run(preprocessor.pack(batch))
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12))
