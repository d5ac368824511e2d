"""The forward pass in PyTorch, on the CPU, CUDA or MPS."""

from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference.runtime import DeviceLost, OutOfMemory


class TorchBackend:
    """Runs the whole SentenceTransformer where it lies; one copy to the device, one copy back."""

    name = "torch"
    lanes = 1

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._device = model.device
        self._pinned = self._device.type == "cuda"

    @torch.inference_mode()
    def forward(self, features: dict[str, Any], lane: int = 0, alone: bool = True) -> Vectors:
        task = {"task": features.pop("task")} if "task" in features else {}
        try:
            output = self._model({k: self._place(v) for k, v in features.items()}, **task)
            vectors: Vectors = output["sentence_embedding"].float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(str(error)) from error
        except torch.AcceleratorError as error:
            # Every CUDA call of this process fails from now on: https://docs.nvidia.com/cuda/,
            # "sticky" errors corrupt the context. The message names the kernel at fault.
            raise DeviceLost(f"the {self._device.type} device failed") from error
        return vectors

    def _place(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor) or self._device.type == "cpu":
            return value
        if self._pinned:
            return value.pin_memory().to(self._device, non_blocking=True)
        return value.to(self._device)
