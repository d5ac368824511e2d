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
    """A SentenceTransformer whose transformer OpenVINO runs, in float32 or with int8 weights."""

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
        compiled = openvino.Core().compile_model(
            graph,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": str(threads),
                # In float32 not a bit is given away.
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(QUANTIZATION_GROUP if int8 else 0),
            },
        )
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._request = compiled.create_infer_request()
        self._later = list(islice(model.children(), 1, None))
        if set(self._names) - set(inputs):
            raise ValueError(f"the converted model asks for {self._names}")

    @torch.inference_mode()
    def forward(self, features: dict[str, Any]) -> Vectors:
        inputs = {name: features[name] for name in self._names}
        result = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        features = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in features.items()}
        features["token_embeddings"] = torch.from_numpy(result[0])
        for module in self._later:
            features = module(features)
        vectors: Vectors = features["sentence_embedding"].numpy()
        return vectors


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
