"""The forward pass in PyTorch, on the CPU, CUDA or MPS."""

from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Backend
from embedding_service.inference.runtime import DeviceLost, OutOfMemory

# While one batch computes, the next one is packed and copied, and the last one's vectors are delivered.
CUDA_STREAMS = 2


def torch_backend(model: SentenceTransformer) -> Backend:
    """The model on its device: two streams on CUDA, one batch at a time on all cores elsewhere."""
    count = CUDA_STREAMS if model.device.type == "cuda" else 1
    return Backend(
        name="torch", version=torch.__version__, sessions=[open_session(model) for _ in range(count)]
    )


def open_session(model: SentenceTransformer) -> "TorchSession":
    """A session of its own; sessions share the model's weights."""
    return CudaSession(model) if model.device.type == "cuda" else TorchSession(model)


class TorchSession:
    """Runs the whole SentenceTransformer on its device; one copy there, one copy back."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._device = model.device

    @torch.inference_mode()
    def run(self, features: dict[str, Any]) -> Vectors:
        try:
            return self._compute(features)
        except RuntimeError as error:
            failure = _failure(error, self._device.type)
            if failure is None:
                raise
        # Only here does the exception no longer hold the frames that hold the tensors.
        if isinstance(failure, OutOfMemory) and self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise failure

    def _compute(self, features: dict[str, Any]) -> Vectors:
        vectors: Vectors = self._embed(features).cpu().numpy()
        return vectors

    def _embed(self, features: dict[str, Any]) -> torch.Tensor:
        task = {"task": features.pop("task")} if "task" in features else {}
        output = self._model({name: self._place(value) for name, value in features.items()}, **task)
        vectors: torch.Tensor = output["sentence_embedding"]
        return vectors.float()

    def _place(self, value: Any) -> Any:
        """An input on the device, if it is an array or a tensor."""
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        return self._copy(value) if isinstance(value, torch.Tensor) else value

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)


class CudaSession(TorchSession):
    """Computes on a CUDA stream of its own, and waits for that stream alone."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__(model)
        # The current device of a thread is the first one, which would hold pinned memory and events.
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # The weights may still be on their way.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            # Blocking: the thread sleeps instead of turning in a loop on a core.
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def _compute(self, features: dict[str, Any]) -> Vectors:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            vectors = self._embed(features)
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        # A copy, so that pinned memory is free for the next batch at once.
        return host.numpy().copy()

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device from pinned memory, so that the copy runs beside the launching of kernels."""
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _failure(error: RuntimeError, device: str) -> OutOfMemory | DeviceLost | None:
    """What a RuntimeError of torch means; None if it says nothing of the device."""
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
