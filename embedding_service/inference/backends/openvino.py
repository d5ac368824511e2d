"""The forward pass in OpenVINO: the transformer compiled for an x86 CPU, the later modules in torch."""

import logging
import warnings
from itertools import islice
from typing import Any

import numpy as np
import openvino
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference.backends.graph_cache import GraphCache

# Activations are quantised at run time in groups of so many values; smaller groups cost time,
# larger ones accuracy (docs/architecture.md, "int8").
QUANTIZATION_GROUP = 32


class OpenVINOBackend:
    """A SentenceTransformer whose transformer OpenVINO runs, in float32 or with int8 weights.

    It is compiled twice: with all cores for one batch, which is fastest for a text alone, and with
    one core for each of several batches at once. Cores that share a batch wait for one another at
    every layer, and wait long where a web worker takes one of them away (docs/architecture.md,
    "Lanes").
    """

    name = "openvino"

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
        self._alone = together.create_infer_request()
        self._lanes = [self._alone]
        if threads > 1:
            apart = _compile(graph, threads, threads, int8)
            self._lanes = [apart.create_infer_request() for _ in range(threads)]
        self.lanes = len(self._lanes)
        self._later = list(islice(model.children(), 1, None))
        # Pooling is small; torch's threads would only take the cores from the lanes.
        torch.set_num_threads(1)

    @torch.inference_mode()
    def forward(self, features: dict[str, Any], lane: int = 0, alone: bool = True) -> Vectors:
        inputs = {name: features[name] for name in self._names}
        # At most one batch is alone at a time, so that its request is never used by two threads.
        request = self._alone if alone else self._lanes[lane]
        result = request.infer(inputs, share_outputs=True)
        features = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in features.items()}
        features["token_embeddings"] = torch.from_numpy(result[0])
        for module in self._later:
            features = module(features)
        vectors: Vectors = features["sentence_embedding"].numpy()
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


def _convert(model: SentenceTransformer, inputs: dict[str, torch.Tensor], int8: bool) -> openvino.Model:
    transformer: Any = model[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(transformer.model, example_input=inputs)
    # The first output is last_hidden_state; the pooler that BERT adds would be computed for nothing.
    while len(graph.outputs) > 1:
        graph.remove_result(graph.get_results()[-1])
    if int8:
        import nncf

        nncf.set_log_level(logging.ERROR)
        # Per channel and symmetric: no zero points to subtract in the inner loop.
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    return graph
