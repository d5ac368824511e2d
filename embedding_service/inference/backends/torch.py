"""The forward pass in PyTorch, on the CPU, CUDA or MPS."""

import contextlib
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
    # From about here on a batch takes the time of its tokens on a CPU, and wider ones only make requests
    # wait (docs/architecture.md, "The token budget on a CPU").
    cpu_batch_tokens = 512

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        self._device = model.device

    @torch.inference_mode()
    def forward(self, features: dict[str, Any], lane: int = 0, alone: bool = True) -> Vectors:
        task = {"task": features.pop("task")} if "task" in features else {}
        try:
            with self._current():
                output = self.model({k: self._place(v) for k, v in features.items()}, **task)
                vectors: Vectors = output["sentence_embedding"].float().cpu().numpy()
                return vectors
        except RuntimeError as error:
            failure = _failure(error, self._device.type)
            if failure is None:
                raise
        # Here, where the exception no longer holds the frames that hold the tensors.
        if isinstance(failure, OutOfMemory) and self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise failure

    def _current(self) -> contextlib.AbstractContextManager[None]:
        """Makes this the current CUDA device of the thread, else the first would hold pinned memory."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _place(self, value: Any) -> Any:
        """Host arrays to the device; pinned, so that the copy runs beside the launching of kernels."""
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor) or self._device.type == "cpu":
            return value
        if self._device.type == "cuda":
            return value.pin_memory().to(self._device, non_blocking=True)
        return value.to(self._device)


def _failure(error: RuntimeError, device: str) -> OutOfMemory | DeviceLost | None:
    """What a RuntimeError of torch means; None where it says nothing of the device."""
    message = str(error)
    # cuBLAS and MPS report a lack of memory as bare RuntimeErrors, CUDA itself in three spellings.
    lacking = ("out of memory", "not enough memory", "_ALLOC_FAILED", "cudaErrorMemoryAllocation")
    if isinstance(error, torch.OutOfMemoryError) or any(words in message for words in lacking):
        return OutOfMemory(message)
    if isinstance(error, torch.AcceleratorError):
        # Every CUDA call of this process fails from now on: https://docs.nvidia.com/cuda/,
        # "sticky" errors corrupt the context. The message names the kernel at fault.
        return DeviceLost(f"the {device} device failed: {message.partition(chr(10))[0]}")
    return None
