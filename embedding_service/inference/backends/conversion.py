"""Converts a SentenceTransformer to a graph of OpenVINO, from token ids to vectors."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import openvino
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from embedding_service.inference.backends.openvino import POOLED_MASK
from embedding_service.inference.checkpoint import find_pooling


class _IdsToVectors(torch.nn.Module):
    """The model as a function of the tensors that `preprocess` makes, for tracing."""

    def __init__(self, model: SentenceTransformer, names: list[str]) -> None:
        super().__init__()
        self._model, self._names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        features: dict[str, Any] = dict(zip(self._names, tensors, strict=True))
        pooled = features.pop(POOLED_MASK, None)
        for module in self._model:
            if pooled is not None and isinstance(module, Pooling):
                features["prompt_length"] = 1
                # It computes this mask from a length, which would become a constant of the graph.
                module._exclude_prompt_from_mask = lambda _mask, _length: pooled
            features = module(features)
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors


def _tensors(example: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}


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


def convert(model: SentenceTransformer, example: dict[str, Any], *, int8: bool) -> openvino.Model:
    """The model as a graph; `example` is one `preprocess`ed batch.

    Raises if the model cannot be converted: ModuleNotFoundError if int8 is asked for without nncf.
    """
    inputs = _tensors(example)
    pooling = find_pooling(model)
    if pooling is not None and not pooling.include_prompt:
        inputs[POOLED_MASK] = inputs["attention_mask"].clone()
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
