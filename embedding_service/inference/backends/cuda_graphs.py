"""CUDA graphs: the forward pass of a shape is recorded once; a single call then launches all its kernels.

Launching a small model's kernels one by one takes the host longer than they take the device
(docs/decisions/0010-cuda-graphs.md has the figures). A batch is padded to the next recorded shape.
"""

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from embedding_service.engine import Vectors
from embedding_service.inference.preprocessing import TokenizerFacts, Unpadded

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
Shape = tuple[int, int]

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


def model_input(
    tokens: torch.Tensor, rows: int, width: int, facts: TokenizerFacts, *, left: bool = False
) -> dict[str, torch.Tensor]:
    """What a model reads, as int64 of shape (rows, width), made on the device from lengths and ids.

    `tokens` is as Unpadded writes it; the padding is on the right or the `left`.
    """
    lengths = tokens[:rows].long()
    # Summed in one dimension: in two, a single thread of the device would go through all rows.
    firsts = (rows + lengths.cumsum(0) - lengths).unsqueeze(1)
    lengths = lengths.unsqueeze(1)
    columns = torch.arange(width, device=tokens.device).unsqueeze(0)
    places = columns - (width - lengths) if left else columns
    real = (places >= 0) & (places < lengths)
    ids = tokens[(firsts + places).clamp(0, tokens.shape[0] - 1)].long()
    # Not torch.where, which copies a number to the device.
    made = {"input_ids": ids.masked_fill(~real, facts.pad_id), "attention_mask": real.long()}
    if "token_type_ids" in facts.inputs:
        made["token_type_ids"] = torch.zeros_like(ids)
    return made


def padded(number: int, step: int) -> int:
    """The next multiple of `step` or of a quarter of the last power of two: four sizes for each doubling."""
    step = max(step, (1 << number.bit_length() - 1) // 4)
    return -(-number // step) * step


class Shapes:
    """The shapes (rows, width) to which batches are padded; no wider than `max_width`.

    A model has no position embeddings beyond that.
    """

    def __init__(self, max_width: int) -> None:
        self._max_width = max_width

    def around(self, rows: int, width: int) -> Shape:
        """The smallest shape that holds a batch."""
        return padded(rows, 1), min(self._max_width, padded(width, NARROWEST))

    def up_to(self, tokens: int) -> list[Shape]:
        """Every shape of at most this many tokens, padding included, the smallest first."""
        shapes, width = [], 0
        while width < self._max_width:
            rows, width = self.around(1, width + 1)
            while rows * width <= tokens:
                shapes.append((rows, width))
                rows = padded(rows + 1, 1)
        return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))


class CudaGraphs:
    """The recorded shapes of one session, which runs one batch at a time on its own stream.

    A batch whose shape is not recorded is launched kernel by kernel; `want` is told of a new shape.
    """

    def __init__(
        self,
        forward: Forward,
        facts: TokenizerFacts,
        max_width: int,
        stream: Any,
        want: Callable[[Shape], None],
    ) -> None:
        self.shapes = Shapes(max_width)
        self.max_tokens = 0
        self._forward = forward
        self._facts = facts
        self._stream = stream
        self._want = want
        self._pool: Any = None
        # None for a shape that is not recorded yet, or cannot be.
        self._recorded: dict[Shape, _Graph | None] = {}

    def launch(self, batch: Unpadded) -> torch.Tensor | None:
        """Launch a batch; returns where its vectors will be, float32 of shape (rows, dimension).

        Returns None if there is no graph for it: of a text whose prompt pooling leaves out, or of more
        tokens, as it is padded, than is worthwhile. The next batch of this shape overwrites the vectors.
        """
        count = len(batch.lengths)
        shape = self.shapes.around(count, batch.width)
        if batch.prompt_length is not None or shape[0] * shape[1] > self.max_tokens:
            return None
        if shape not in self._recorded:
            self._recorded[shape] = None
            self._want(shape)
        graph = self._recorded[shape]
        if graph is None:
            return None
        used = batch.write(graph.staging.numpy(), shape[0])
        graph.tokens[:used].copy_(graph.staging[:used], non_blocking=True)
        graph.graph.replay()
        return graph.vectors[:count]

    def find_limit(
        self,
        run: Callable[[Unpadded, bool], Vectors],
        record: Callable[[Shape], None],
        example: Unpadded,
        most: int,
    ) -> int:
        """The largest number of tokens for which a graph is worthwhile, at most `most`.

        It is 0 if padding to a shape changes the model's vectors. `run` embeds a batch, with a graph or
        without, and waits for it. `example` is a batch of one text.
        """
        length, ids = int(example.lengths[0]), example.ids[0]
        half = -(-length // 2)
        shorter = replace(example, lengths=np.array([half], np.int32), ids=[ids[:half]], width=half)
        expected = np.concatenate([run(example, False), run(shorter, False)])
        both = replace(example, lengths=np.array([length, half], np.int32), ids=[ids, ids[:half]])
        self.max_tokens = most
        record(self.shapes.around(2, length))
        if not np.abs(run(both, True) - expected).max() <= TOLERANCE * np.abs(expected).max():
            log.warning("CUDA graphs change this model's vectors and are not used, which is slower")
            return 0
        # As wide as a shape, so that both ways compute the same.
        rows, width = self.shapes.around(1, length)
        limit = 0
        while rows * width <= most:
            batch = replace(example, lengths=np.full(rows, length, np.int32), ids=[ids] * rows, width=width)
            record((rows, width))
            if _seconds(run, batch, True) > WORTHWHILE * _seconds(run, batch, False):
                return limit
            limit, rows = rows * width, 2 * rows
        return most

    def record(self, shape: Shape) -> None:
        """Record a shape, unless it has been; called in the session's stream while no batch runs there."""
        if self._recorded.get(shape) is not None:
            return
        self._recorded[shape] = None
        try:
            self._recorded[shape] = self._new_graph(*shape)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            log.warning("No CUDA graph for batches of %d × %d tokens, which are slower: %s", *shape, reason)

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._recorded.values())

    def _new_graph(self, rows: int, width: int) -> "_Graph":
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Every row one token until there is a batch; token 1 is in every vocabulary.
        staging = torch.ones(rows + rows * width, dtype=torch.int32).pin_memory()
        tokens = staging.to(self._stream.device)
        graph = torch.cuda.CUDAGraph()

        def forward() -> torch.Tensor:
            return self._forward(model_input(tokens, rows, width, self._facts))

        with _undisturbed():
            # In their first pass libraries allocate memory and choose kernels, which is not for a graph.
            forward()
            # Other threads go on; only what this one does belongs to the graph.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                vectors = forward()
        return _Graph(graph, staging, tokens, vectors)


@dataclass(slots=True, frozen=True, eq=False)
class _Graph:
    """The recorded pass of one shape, and the memory it uses; `staging` is the host's, and pinned."""

    graph: Any
    staging: torch.Tensor
    tokens: torch.Tensor
    vectors: torch.Tensor


def _seconds(run: Callable[[Unpadded, bool], Vectors], batch: Unpadded, with_graph: bool) -> float:
    """The shortest of three runs, after one that prepares."""
    run(batch, with_graph)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        run(batch, with_graph)
        took.append(time.perf_counter() - began)
    return min(took)
