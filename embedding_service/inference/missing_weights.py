"""Finds weights that a model's files lack, which `transformers` fills with random numbers and a warning."""

import functools
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

_load = Transformer._load_model


@functools.wraps(_load)
def _load_and_note(self: Transformer, *args: Any, **kwargs: Any) -> Any:
    network, report = _load(self, *args, output_loading_info=True, **kwargs)
    network.missing_weights = frozenset(report["missing_keys"])
    return network


# sentence-transformers hands on the model alone, and not the report that belongs to it.
Transformer._load_model = _load_and_note


def missing_weight(model: SentenceTransformer) -> str | None:
    """The name of a weight that the files lack and on which vectors depend; None if there is none.

    Many good models lack weights that play no part, such as those of a pooler for another task.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            network = module.model
            weights = {
                name: weight
                for name, weight in network.named_parameters()
                if name in getattr(network, "missing_weights", ()) and weight.is_floating_point()
            }
            if weights and (used := _used(module, weights)):
                return used
    return None


def _used(module: Transformer, weights: dict[str, torch.nn.Parameter]) -> str | None:
    """The first of these weights from which something flows into the module's output."""
    device = next(iter(weights.values())).device
    with torch.enable_grad():
        features = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in module.preprocess(["a text"]).items()
        }
        outputs = [
            value.float().sum()
            for value in module(features).values()
            if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        slopes = torch.autograd.grad(outputs, list(weights.values()), allow_unused=True)
    return next((name for name, slope in zip(weights, slopes, strict=True) if slope is not None), None)
