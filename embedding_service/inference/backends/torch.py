"""The forward pass in PyTorch, on the CPU, CUDA or MPS."""

import logging
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Backend
from embedding_service.inference.backends.cuda_graphs import CudaGraphs
from embedding_service.inference.runtime import DeviceLost, OutOfMemory

log = logging.getLogger(__name__)

# While one batch computes, the next one is packed and copied, and the last one's vectors are delivered.
CUDA_STREAMS = 2

# How long each stream may record CUDA graphs at the start.
RECORDING_SECONDS = 1.0


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

    def record_ahead(self, example: dict[str, Any], max_width: int, max_tokens: int) -> None:
        """Only CUDA has graphs."""

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
        return self._forward({name: self._place(value) for name, value in features.items()}, **task)

    def _forward(self, placed: dict[str, Any], **task: str) -> torch.Tensor:
        vectors: torch.Tensor = self._model(placed, **task)["sentence_embedding"]
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
        self._graphs: CudaGraphs | None = None
        # The current device of a thread is the first one, which would hold pinned memory and events.
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # The weights may still be on their way.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            # Blocking: the thread sleeps instead of turning in a loop on a core.
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def _compute(self, features: dict[str, Any]) -> Vectors:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            vectors = self._launch(features)
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        # A copy, so that pinned memory is free for the next batch at once.
        return host.numpy().copy()

    def _launch(self, features: dict[str, Any]) -> torch.Tensor:
        graphs = self._graphs
        vectors = graphs.run(features) if graphs is not None and graphs.fit(features) else None
        return self._embed(features) if vectors is None else vectors

    @torch.inference_mode()
    def record_ahead(self, example: dict[str, Any], max_width: int, max_tokens: int) -> None:
        if "attention_mask" not in example or not all(
            isinstance(one, np.ndarray) for one in example.values()
        ):
            return
        graphs = CudaGraphs(self._forward, list(example), max_width, self._device, self._stream)
        self._graphs = graphs
        try:
            graphs.find_limit(lambda batch: self.run(dict(batch)), example, max_tokens)
        except OutOfMemory:
            # The warm-up looks for the largest size that fits.
            self._graphs = None
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            count = graphs.record_ahead(RECORDING_SECONDS)
        log.info("CUDA graphs: for batches of up to %d tokens, %d recorded", graphs.max_tokens, count)

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
