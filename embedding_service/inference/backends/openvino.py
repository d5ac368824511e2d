"""The forward pass in OpenVINO, without torch: the whole model, from token ids to vectors, on an x86 CPU."""

from pathlib import Path
from typing import Any

import openvino

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Backend, Session

# Activations are quantised at run time in groups of this many values; smaller groups cost time,
# larger ones accuracy (docs/decisions/0004-int8.md).
QUANTIZATION_GROUP = 64

GRAPH = "model.xml"

# The input of a graph whose pooling leaves the prompt out: the attention mask without the prompt.
POOLED_MASK = "pooled_mask"


def read_graph(folder: Path) -> openvino.Model:
    """The graph in a folder, whose weights stay in the file. Raises RuntimeError."""
    return openvino.Core().read_model(folder / GRAPH)


def weights_of(folder: Path) -> Path:
    """The file of the weights of the graph in a folder, which are mapped, not read."""
    return (folder / GRAPH).with_suffix(".bin").resolve()


def write_graph(graph: openvino.Model, folder: Path) -> None:
    """Put a graph into a folder. Raises RuntimeError."""
    openvino.save_model(graph, folder / GRAPH, compress_to_fp16=False)


def openvino_backend(graph: openvino.Model, *, dtype: str, threads: int) -> Backend:
    """Compile a graph twice: with all cores for one batch, with one core for each of several.

    The first is fastest for a text alone. But cores that share a batch wait for one another at every
    layer, and wait long if a web worker takes one of them away (docs/decisions/0006-one-lane-per-core.md).
    """
    compiled = _compile(graph, 1, threads, dtype)
    whole = OpenVINOSession(compiled)
    if threads == 1:
        return Backend(name="openvino", version=openvino.__version__, sessions=[whole])
    apart = _compile(graph, threads, threads, dtype)
    sessions: list[Session] = [OpenVINOSession(apart) for _ in range(threads)]
    return Backend(name="openvino", version=openvino.__version__, sessions=sessions, whole=whole)


class OpenVINOSession:
    """One infer request of a compiled graph."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._leaves_prompt_out = POOLED_MASK in self._names

    def record_ahead(self, example: dict[str, Any], max_width: int, max_tokens: int) -> None:
        """A graph of OpenVINO takes every shape."""

    def run(self, features: dict[str, Any]) -> Vectors:
        if self._leaves_prompt_out:
            pooled = features["attention_mask"].copy()
            pooled[:, : features.get("prompt_length", 0)] = 0
            features = {**features, POOLED_MASK: pooled}
        vectors: Vectors = self._request.infer({name: features[name] for name in self._names})[0]
        return vectors


def _compile(graph: openvino.Model, streams: int, threads: int, dtype: str) -> openvino.CompiledModel:
    settings = {
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        # Each of several model processes, or services, would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": "NO",
        # In float32 not a bit is given away.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(QUANTIZATION_GROUP if dtype == "int8" else 0),
    }
    return openvino.Core().compile_model(graph, "CPU", settings)
