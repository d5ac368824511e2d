"""The forward pass in OpenVINO: the transformer compiled for an x86 CPU, the later modules in torch."""

import os
import warnings
from itertools import islice
from typing import Any

import numpy as np
import openvino
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors


class OpenVINOBackend:
    """A SentenceTransformer whose transformer OpenVINO runs, in float32."""

    name = "openvino"

    def __init__(self, model: SentenceTransformer, example: dict[str, Any]) -> None:
        """Convert and compile; `example` is one `preprocess`ed batch. Raises where it cannot."""
        transformer: Any = model[0]
        inputs = {k: v for k, v in example.items() if isinstance(v, torch.Tensor)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = openvino.convert_model(transformer.model, example_input=inputs)
        # The first output is last_hidden_state; the pooler that BERT adds would be computed for nothing.
        while len(graph.outputs) > 1:
            graph.remove_result(graph.get_results()[-1])
        compiled = openvino.Core().compile_model(
            graph,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": str(available_cores()),
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


def available_cores() -> int:
    """Cores this process may run on, which a container's cpuset may have made fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
