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
    """A SentenceTransformer whose transformer OpenVINO runs, in float32.

    It is compiled twice: with all cores for one batch, which is fastest for a text alone, and with
    one core for each of several batches at once. Cores that share a batch wait for one another at
    every layer, and wait long where a web worker takes one of them away (docs/architecture.md,
    "Lanes").
    """

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
        cores = available_cores()
        together = _compile(graph, streams=1, threads=cores)
        self._names = [port.get_any_name() for port in together.inputs]
        if set(self._names) - set(inputs):
            raise ValueError(f"the converted model asks for {self._names}")
        self._alone = together.create_infer_request()
        self._lanes = [self._alone]
        if cores > 1:
            apart = _compile(graph, streams=cores, threads=cores)
            self._lanes = [apart.create_infer_request() for _ in range(cores)]
        self.lanes = len(self._lanes)
        self._later = list(islice(model.children(), 1, None))

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


def available_cores() -> int:
    """Cores this process may run on, which a container's cpuset may have made fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile(graph: Any, streams: int, threads: int) -> Any:
    settings = {
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return openvino.Core().compile_model(graph, "CPU", settings)
