"""CUDA graphs: the forward pass of a shape is recorded once; a single call then launches all its kernels.

Launching a small model's kernels one by one takes the host longer than they take the device
(docs/decisions/0010-cuda-graphs.md has the figures). A batch is padded to the next recorded shape.
"""

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedding_service.engine import Vectors

log = logging.getLogger(__name__)

# A graph is used only up to the size at which it takes this share of the time of a pass that is launched
# kernel by kernel. The rest pays for padding batches to a recorded shape.
WORTHWHILE = 0.8

# How far vectors of a graph may be from those of a single launch, as a share of the largest number: bfloat16
# has three digits, which the layers of a model add up.
TOLERANCE = 0.05

# Tensor cores work on multiples of 8, and a few columns more cost a small batch nothing.
NARROWEST = 16

Forward = Callable[[dict[str, torch.Tensor]], torch.Tensor]
Arrays = Mapping[str, np.ndarray]

_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """PyTorch records one graph at a time, and freeing another one in this thread spoils the recording."""
    with _one_at_a_time:
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def padded(number: int, step: int) -> int:
    """The next multiple of `step` or of a quarter of the last power of two: four sizes for each doubling."""
    step = max(step, _octave(number) // 4)
    return -(-number // step) * step


def _octave(number: int) -> int:
    """The largest power of two that is not more than this."""
    return 1 << (number.bit_length() - 1)


class Shapes:
    """The shapes (rows, width) to which batches are padded; no wider than `max_width`.

    A model has no position embeddings beyond that.
    """

    def __init__(self, max_width: int) -> None:
        self._max_width = max_width

    def around(self, rows: int, width: int) -> tuple[int, int]:
        """The smallest shape that holds a batch."""
        return padded(rows, 1), min(self._max_width, padded(width, NARROWEST))

    def up_to(self, tokens: int) -> list[tuple[int, int]]:
        """Every shape of at most this many tokens, padding included, the smallest first."""
        widths = {self.around(1, width)[1] for width in range(1, self._max_width + 1)}
        found = {self.around(rows, width) for width in widths for rows in range(1, tokens // width + 1)}
        return sorted(
            (shape for shape in found if shape[0] * shape[1] <= tokens),
            key=lambda shape: (shape[0] * shape[1], shape),
        )


class CudaGraphs:
    """The recorded shapes of one session, which runs one batch at a time on its own stream.

    `forward` computes vectors from the inputs called `names`; one must be `attention_mask`.
    """

    def __init__(
        self, forward: Forward, names: list[str], max_width: int, device: torch.device, stream: Any
    ) -> None:
        self.max_tokens = 0
        self._forward = forward
        self._names = names
        self._shapes = Shapes(max_width)
        self._device = device
        self._stream = stream
        self._pool: Any = None
        # None for a shape that cannot be recorded.
        self._recorded: dict[tuple[int, int], _Graph | None] = {}

    def fit(self, features: Arrays) -> bool:
        """Whether a graph can compute this batch: arrays of one shape, padded on the right if at all.

        What counts is the shape to which the batch is padded: three tokens a text become sixteen.
        """
        if list(features) != self._names:
            return False
        mask = features["attention_mask"]
        rows, width = self._shapes.around(*mask.shape)
        return rows * width <= self.max_tokens and bool(mask[:, 0].all())

    def run(self, features: Arrays) -> torch.Tensor | None:
        """Launch a batch; returns where its vectors will be, float32 of shape (rows, dimension).

        Records the shape if it is new; returns None if that fails. The next batch of this shape overwrites
        the vectors.
        """
        rows, width = features["attention_mask"].shape
        shape = self._shapes.around(rows, width)
        if shape not in self._recorded:
            self._record(shape)
        recorded = self._recorded[shape]
        if recorded is None:
            return None
        staged = recorded.staging.numpy()
        # Token 0 is in every vocabulary, and the mask hides it.
        staged.fill(0)
        for place, name in enumerate(self._names):
            staged[place, :rows, :width] = features[name]
        # A row without any token would divide by zero.
        staged[self._names.index("attention_mask"), rows:, 0] = 1
        recorded.inputs.copy_(recorded.staging, non_blocking=True)
        recorded.graph.replay()
        return recorded.vectors[:rows]

    def find_limit(self, run: Callable[[Arrays], Vectors], example: Arrays, most: int) -> None:
        """Set `max_tokens` to the largest size for which a graph is worthwhile, at most `most`.

        It stays 0 if padding to a shape changes the model's vectors. `run` embeds a batch and waits for it.
        `example` is a batch of one text.
        """
        expected = run(example)
        self.max_tokens = most
        if np.abs(run(example) - expected).max() > TOLERANCE * np.abs(expected).max():
            log.warning("CUDA graphs change this model's vectors and are not used, which is slower")
            self.max_tokens = 0
            return
        # As wide as a shape, so that both ways compute the same.
        width = example["attention_mask"].shape[1]
        missing = self._shapes.around(1, width)[1] - width
        one = {name: np.pad(array, [(0, 0), (0, missing)]) for name, array in example.items()}
        limit, rows = 0, 1
        while (tokens := rows * (width + missing)) <= most:
            batch = {name: np.repeat(array, rows, axis=0) for name, array in one.items()}
            self.max_tokens = 0
            launched = _seconds(run, batch)
            self.max_tokens = most
            if _seconds(run, batch) > WORTHWHILE * launched:
                self.max_tokens = limit
                return
            limit, rows = tokens, 2 * rows

    def record_ahead(self, seconds: float) -> int:
        """Record shapes, the smallest first, for this long; returns how many are recorded.

        The others are recorded when they first occur.
        """
        end = time.monotonic() + seconds
        for shape in self._shapes.up_to(self.max_tokens):
            if time.monotonic() > end:
                break
            if shape not in self._recorded:
                self._record(shape)
        return sum(graph is not None for graph in self._recorded.values())

    def _record(self, shape: tuple[int, int]) -> None:
        try:
            self._recorded[shape] = self._new_graph(shape)
        except RuntimeError as error:
            self._recorded[shape] = None
            reason = str(error).partition("\n")[0]
            log.warning("No CUDA graph for batches of %d × %d tokens, which are slower: %s", *shape, reason)

    def _new_graph(self, shape: tuple[int, int]) -> "_Graph":
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        staging = torch.ones((len(self._names), *shape), dtype=torch.int64).pin_memory()
        inputs = staging.to(self._device)
        named = dict(zip(self._names, inputs, strict=True))
        graph = torch.cuda.CUDAGraph()
        with _undisturbed():
            # In their first pass libraries allocate memory and choose kernels, which is not for a graph.
            self._forward(dict(named))
            # Other threads go on; only what this one does belongs to the graph.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                vectors = self._forward(dict(named))
        return _Graph(graph, staging, inputs, vectors)


@dataclass(slots=True, frozen=True, eq=False)
class _Graph:
    """The recorded pass of one shape, and the memory it uses; `staging` is the host's, and pinned."""

    graph: Any
    staging: torch.Tensor
    inputs: torch.Tensor
    vectors: torch.Tensor


def _seconds(run: Callable[[Arrays], Vectors], batch: Arrays) -> float:
    """The shortest of three runs; one before that records or prepares."""
    run(batch)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        run(batch)
        took.append(time.perf_counter() - began)
    return min(took)
