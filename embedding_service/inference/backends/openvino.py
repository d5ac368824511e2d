"""The forward pass in OpenVINO: the whole model, from token ids to vectors, compiled for an x86 CPU."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import openvino
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Backend, Session
from embedding_service.inference.backends.graph_cache import GraphCache
from embedding_service.inference.backends.torch import TorchSession

# Activations are quantised at run time in groups of this many values; smaller groups cost time,
# larger ones accuracy (docs/decisions/0004-int8.md).
QUANTIZATION_GROUP = 64

# What a converted graph computes. Increased whenever that changes, so that older cache entries are not used.
GRAPH_FORM = "ids to vectors, 2"


def load_graph(
    model: SentenceTransformer, example: dict[str, Any], *, dtype: str, cache: GraphCache | None
) -> tuple[openvino.Model, bool]:
    """The model as a graph, and whether it came from the cache; `example` is one `preprocess`ed batch.

    Raises if the model cannot be converted: ModuleNotFoundError if int8 is asked for without nncf.
    """
    graph = cache.load() if cache else None
    if graph is not None:
        return graph, True
    graph = _convert(model, _tensors(example), dtype == "int8")
    if cache is not None:
        cache.save(graph)
    return graph, False


def openvino_backend(
    graph: openvino.Model, model: SentenceTransformer, example: dict[str, Any], *, dtype: str, threads: int
) -> Backend:
    """Compile a graph twice: with all cores for one batch, and with one core for each of several.

    The first is fastest for a text alone. But cores that share a batch wait for one another at every
    layer, and wait long if a web worker takes one of them away (docs/decisions/0006-one-lane-per-core.md).
    """
    compiled = _compile(graph, 1, threads, dtype)
    names = [port.get_any_name() for port in compiled.inputs]
    if set(names) - set(_tensors(example)):
        raise ValueError(f"the converted model asks for {names}")
    without_prompt = TorchSession(model)

    def open_session(compiled: openvino.CompiledModel) -> Session:
        return OpenVINOSession(compiled.create_infer_request(), names, without_prompt)

    whole = open_session(compiled)
    if threads == 1:
        return Backend(name="openvino", version=openvino.__version__, sessions=[whole])
    apart = _compile(graph, threads, threads, dtype)
    sessions = [open_session(apart) for _ in range(threads)]
    return Backend(name="openvino", version=openvino.__version__, sessions=sessions, whole=whole)


class OpenVINOSession:
    """One infer request of a compiled graph."""

    def __init__(
        self, request: openvino.InferRequest, names: list[str], without_prompt: TorchSession
    ) -> None:
        self._request = request
        self._names = names
        self._without_prompt = without_prompt

    def record_ahead(self, example: dict[str, Any], max_width: int, max_tokens: int) -> None:
        """A graph of OpenVINO takes every shape."""

    def run(self, features: dict[str, Any]) -> Vectors:
        if "prompt_length" in features:
            # Pooling without the prompt is another graph; such models are rare.
            return self._without_prompt.run(features)
        vectors: Vectors = self._request.infer({name: features[name] for name in self._names})[0]
        return vectors


class _IdsToVectors(torch.nn.Module):
    """The model as a function of the tensors that `preprocess` makes, for tracing."""

    def __init__(self, model: SentenceTransformer, names: list[str]) -> None:
        super().__init__()
        self._model, self._names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self._model(dict(zip(self._names, tensors, strict=True)))[
            "sentence_embedding"
        ]
        return vectors


def _tensors(example: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, and restore the root logger's level.

    Tracing looks at every attribute, and transformers warns about those that are not set. OpenVINO
    sets the root's level to ERROR and leaves it there if the conversion fails.
    """
    loggers = logging.getLogger(), logging.getLogger("transformers")
    levels = [logger.level for logger in loggers]
    loggers[1].setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _convert(model: SentenceTransformer, inputs: dict[str, torch.Tensor], int8: bool) -> openvino.Model:
    names = list(inputs)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(_IdsToVectors(model, names), example_input=tuple(inputs.values()))
    for port, name in zip(graph.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    if int8:
        import nncf

        nncf.set_log_level(logging.ERROR)
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return graph
