"""What the batcher needs from a loaded model, and the two device failures that it can handle."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from embedding_service.engine import (
    Chunk,
    EmbedRequest,
    ModelInfo,
    SplitRequest,
    TokenizedText,
    TokensRequest,
    Vectors,
)
from embedding_service.inference.budget import BatchBudget

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Side = Literal["left", "right"]


class OutOfMemory(Exception):
    """The batch did not fit in the device's memory; a smaller one may."""


class DeviceLost(Exception):
    """The device can no longer be used by this process."""


@dataclass(slots=True, frozen=True, eq=False)
class Prepared:
    """Some texts of one request, in their order, as the model reads them.

    `lengths` counts the tokens of each text after truncation, special tokens included. Only texts of
    equal `group` may share a batch. `content` belongs to the preprocessor that made it.
    """

    lengths: IntArray
    truncated: BoolArray
    group: Hashable
    content: Any


@dataclass(slots=True, frozen=True, eq=False)
class Slice:
    """Rows of one Prepared, as part of a batch; `rows` are indices into its texts."""

    texts: Prepared
    rows: IntArray

    @classmethod
    def of(cls, texts: Prepared) -> "Slice":
        """All of its rows."""
        return cls(texts, np.arange(len(texts.lengths), dtype=np.int32))

    @property
    def lengths(self) -> IntArray:
        """The tokens of each row."""
        lengths: IntArray = self.texts.lengths[self.rows]
        return lengths


# All slices of a batch are of one group.
Batch = Sequence[Slice]


class Lane(Protocol):
    """Runs one batch at a time, on resources that no other lane uses."""

    def forward(self, batch: Batch) -> Vectors:
        """Vectors of shape (rows, dimension), in the order of the slices and their rows.

        Raises OutOfMemory or DeviceLost.
        """


class Runtime(Protocol):
    """A loaded model. Safe from any thread, except that each lane is driven by one thread at a time.

    All `lanes` may run at once. `whole`, if there is one, computes a batch on every core: for a batch
    that nothing else runs or waits beside. No batch may hold more than `max_batch_tokens`, padding
    included; `budget` says how many it should hold.
    """

    lanes: list[Lane]
    whole: Lane | None

    max_seq_length: int
    max_batch_tokens: int
    budget: BatchBudget
    separate_bulk: bool
    normalized: bool
    uses_accelerator: bool
    info: ModelInfo

    def prompt(self, request: EmbedRequest | SplitRequest | TokensRequest) -> str | None:
        """The text to put in front of each text; raises InvalidRequest for a name the model lacks."""

    def prepare(
        self,
        texts: Sequence[str],
        prompt: str | None,
        task: str | None,
        side: Side | None = None,
        *,
        parallel: bool = False,
    ) -> Prepared:
        """Tokenize texts, cut at `side`; `parallel` uses several cores.

        Raises InvalidRequest, with the index, for a text that is not Unicode.
        """

    def list_tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenizedText]:
        """Every token of the texts, for display; raises InvalidRequest."""

    def split(self, texts: Sequence[str], request: SplitRequest) -> list[list[Chunk]]:
        """The pieces of some of the request's texts that the model can read whole; raises InvalidRequest."""

    def embed_tokens(self, texts: Sequence[str], request: TokensRequest) -> list[Vectors]:
        """The vectors of each text's tokens, of shape (tokens, dimension); raises InvalidRequest."""

    def forward_exact(self, one: Slice) -> Vectors:
        """The vector of one text, of shape (1, dimension), computed in float32 throughout."""
