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
from embedding_service.inference.backends.graph_cache import GraphCache
from embedding_service.inference.backends.torch import TorchBackend

# Activations are quantised at run time in groups of so many values; smaller groups cost time,
# larger ones accuracy (docs/architecture.md, "int8").
QUANTIZATION_GROUP = 64

# What a converted graph computes; another number where that changes, so that no cache gives an older one.
GRAPH_FORM = "ids to vectors, 2"


class OpenVINOBackend:
    """A SentenceTransformer that OpenVINO runs, in float32 or with int8 weights.

    It is compiled twice: with all cores for one batch, which is fastest for a text alone, and with
    one core for each of several batches at once. Cores that share a batch wait for one another at
    every layer, and wait long where a web worker takes one of them away (docs/architecture.md,
    "Lanes").
    """

    name = "openvino"
    # For each lane, as TorchBackend's.
    cpu_batch_tokens = 128

    def __init__(
        self,
        model: SentenceTransformer,
        example: dict[str, Any],
        *,
        threads: int,
        int8: bool = False,
        cache: GraphCache | None = None,
    ) -> None:
        """Convert and compile; `example` is one `preprocess`ed batch. Raises where it cannot.

        Raises ModuleNotFoundError where int8 is asked for and nncf is not installed.
        """
        inputs = {k: v for k, v in example.items() if isinstance(v, torch.Tensor)}
        graph = cache.load() if cache else None
        self.from_cache = graph is not None
        if graph is None:
            graph = _convert(model, inputs, int8)
            if cache is not None:
                cache.save(graph)
        together = _compile(graph, 1, threads, int8)
        self._names = [port.get_any_name() for port in together.inputs]
        if set(self._names) - set(inputs):
            raise ValueError(f"the converted model asks for {self._names}")
        self._whole = TorchBackend(model)
        self._alone = together.create_infer_request()
        self._lanes = [self._alone]
        if threads > 1:
            apart = _compile(graph, threads, threads, int8)
            self._lanes = [apart.create_infer_request() for _ in range(threads)]
        self.lanes = len(self._lanes)

    def forward(self, features: dict[str, Any], lane: int = 0, alone: bool = True) -> Vectors:
        if "prompt_length" in features:
            # Pooling without the prompt is another graph; such models are few.
            return self._whole.forward(features)
        # At most one batch is alone at a time, so that its request is never used by two threads.
        request = self._alone if alone else self._lanes[lane]
        vectors: Vectors = request.infer({name: features[name] for name in self._names})[0]
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


def _compile(graph: openvino.Model, streams: int, threads: int, int8: bool) -> openvino.CompiledModel:
    settings = {
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
        # Each of several model processes, or services, would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": "NO",
        # In float32 not a bit is given away.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(QUANTIZATION_GROUP if int8 else 0),
    }
    return openvino.Core().compile_model(graph, "CPU", settings)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Tracing looks at every attribute, and transformers warns about those that nobody has set."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _convert(model: SentenceTransformer, inputs: dict[str, torch.Tensor], int8: bool) -> openvino.Model:
    names = list(inputs)
    with warnings.catch_warnings(), _quiet_transformers():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(_IdsToVectors(model, names), example_input=tuple(inputs.values()))
    for port, name in zip(graph.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    if int8:
        import nncf

        nncf.set_log_level(logging.ERROR)
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return graph
