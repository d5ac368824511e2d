"""The forward pass in PyTorch, on the CPU, CUDA or MPS."""

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Backend
from embedding_service.inference.backends.cuda_graphs import CudaGraphs, Shape, model_input
from embedding_service.inference.device import may_spin
from embedding_service.inference.preprocessing import TokenizerFacts, Unpadded
from embedding_service.inference.runtime import DeviceLost, OutOfMemory

log = logging.getLogger(__name__)

# While one batch computes, the next one is packed and copied, and the last one's vectors are delivered.
CUDA_STREAMS = 2

# How long CUDA graphs are recorded before their shapes occur.
RECORDING_SECONDS = 2.0


def torch_backend(model: SentenceTransformer, cores: int) -> Backend:
    """The model on its device: two streams on CUDA, one batch at a time on all `cores` elsewhere."""
    if model.device.type != "cuda":
        return Backend(name="torch", version=torch.__version__, sessions=[TorchSession(model)])
    sessions = [CudaSession(model, spins=may_spin(cores)) for _ in range(CUDA_STREAMS)]

    def record(example: Unpadded, max_width: int, max_tokens: int) -> None:
        wanted: queue.SimpleQueue[tuple[int, Shape] | None] = queue.SimpleQueue()
        arguments = (sessions, example, max_width, max_tokens, wanted)
        thread = threading.Thread(target=record_graphs, args=arguments, name="graphs", daemon=True)
        thread.start()

        def end() -> None:
            # Python's end aborts the process if a thread is in a call of CUDA then.
            wanted.put(None)
            thread.join()

        atexit.register(end)

    return Backend(name="torch", version=torch.__version__, sessions=[*sessions], pads=True, record=record)


def open_session(model: SentenceTransformer) -> "TorchSession":
    """A session of its own; sessions share the model's weights."""
    return CudaSession(model) if model.device.type == "cuda" else TorchSession(model)


class TorchSession:
    """Runs the whole SentenceTransformer on its device; one copy there, one copy back."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._device = model.device

    @torch.inference_mode()
    def run(self, features: Any) -> Vectors:
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

    def _compute(self, features: Any) -> Vectors:
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
    """Computes on a CUDA stream of its own, and waits for that stream alone.

    Once it has `graphs`, batches that these hold are launched in one call.
    """

    def __init__(self, model: SentenceTransformer, *, spins: bool = False) -> None:
        """It `spins`, or else sleeps, while it waits for the device."""
        super().__init__(model)
        self.graphs: CudaGraphs | None = None
        self._graphs_to_use: CudaGraphs | None = None
        # A graph is recorded in another thread, while no batch runs here.
        self._turn = threading.Lock()
        # The current device of a thread is the first one, which would hold pinned memory and events.
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # The weights may still be on their way.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._done = torch.cuda.Event(blocking=not spins)  # type: ignore[no-untyped-call]

    def run(self, features: Any) -> Vectors:
        return self.run_with(self.graphs, features)

    def run_with(self, graphs: CudaGraphs | None, features: Any) -> Vectors:
        """Run a batch with graphs that others do not use yet, or without any."""
        with self._turn:
            self._graphs_to_use = graphs
            return super().run(features)

    @torch.inference_mode()
    def record(self, graphs: CudaGraphs, shape: Shape) -> None:
        """Record a shape between two batches."""
        with self._turn, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            graphs.record(shape)

    def new_graphs(self, facts: TokenizerFacts, max_width: int, want: Callable[[Shape], None]) -> CudaGraphs:
        """Graphs for this session, none of them recorded."""
        return CudaGraphs(self._forward, facts, max_width, self._stream, want)

    def _compute(self, features: Any) -> Vectors:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            vectors = self._launch(features)
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        # A copy, so that pinned memory is free for the next batch at once.
        return host.numpy().copy()

    def _launch(self, features: Any) -> torch.Tensor:
        if not isinstance(features, Unpadded):
            return self._embed(features)
        graphs = self._graphs_to_use
        vectors = graphs.launch(features) if graphs is not None else None
        return self._launch_kernels(features) if vectors is None else vectors

    def _launch_kernels(self, batch: Unpadded) -> torch.Tensor:
        rows, facts = len(batch.lengths), batch.facts
        staging = torch.empty(rows + int(batch.lengths.sum()), dtype=torch.int32, pin_memory=True)
        batch.write(staging.numpy(), rows)
        tokens = staging.to(self._device, non_blocking=True)
        placed = model_input(tokens, rows, batch.width, facts, left=facts.pads_left)
        prompt = {} if batch.prompt_length is None else {"prompt_length": batch.prompt_length}
        return self._forward(placed | prompt)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device from pinned memory, so that the copy runs beside the launching of kernels."""
        return tensor.pin_memory().to(self._device, non_blocking=True)


def record_graphs(
    sessions: Sequence[CudaSession],
    example: Unpadded,
    max_width: int,
    max_tokens: int,
    wanted: "queue.SimpleQueue[tuple[int, Shape] | None]",
) -> None:
    """Record the sessions' graphs while they serve: for some time ahead, then the shapes that occur.

    These come through `wanted`, each with the number of its session, until None does.
    """

    def want(at: int, shape: Shape) -> None:
        wanted.put((at, shape))

    made = [
        session.new_graphs(example.facts, max_width, partial(want, at)) for at, session in enumerate(sessions)
    ]

    def record(at: int, shape: Shape) -> None:
        sessions[at].record(made[at], shape)

    def run(batch: Unpadded, with_graph: bool) -> Vectors:
        return sessions[0].run_with(made[0] if with_graph else None, batch)

    try:
        limit = made[0].find_limit(run, partial(record, 0), example, max_tokens)
    except Exception as error:
        # If the device is lost, the next batch says so too.
        log.warning("CUDA graphs are not used, which is slower: %s", error)
        return
    for session, graphs in zip(sessions, made, strict=True):
        graphs.max_tokens = limit
        session.graphs = graphs
    end = time.monotonic() + RECORDING_SECONDS
    for shape, at in product(made[0].shapes.up_to(limit), range(len(sessions))):
        if time.monotonic() > end:
            break
        record(at, shape)
    log.info("CUDA graphs: for batches of up to %d tokens, %d recorded", limit, sum(map(len, made)))
    for at, shape in iter(wanted.get, None):
        record(at, shape)


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
