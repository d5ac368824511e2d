"""What the batcher needs from a loaded model, and the two device failures that it can handle."""

from collections.abc import Sequence
from typing import Literal, Protocol

from embedding_service.engine import (
    Chunk,
    EmbedRequest,
    ModelInfo,
    TokenizedText,
    TokenVectorsRequest,
    Vectors,
)
from embedding_service.inference.budget import BatchBudget
from embedding_service.inference.tokenized import Batch, Rows, TokenizedTexts

Side = Literal["left", "right"]


class OutOfMemory(Exception):
    """The batch did not fit in the device's memory; a smaller one may."""


class DeviceLost(Exception):
    """The device can no longer be used by this process."""


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

    def prompt(self, request: EmbedRequest | TokenVectorsRequest) -> str | None:
        """The text to put in front of each text; raises InvalidRequest for a name the model lacks."""

    def prepare(
        self,
        texts: Sequence[str],
        prompt: str | None,
        task: str | None,
        side: Side | None = None,
        *,
        parallel: bool = False,
    ) -> TokenizedTexts:
        """Tokenize texts, cut at `side`; `parallel` uses several cores.

        Raises InvalidRequest, with the index, for a text that is not Unicode.
        """

    def list_tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenizedText]:
        """Every token of the texts, for display; raises InvalidRequest."""

    def split(self, texts: Sequence[str], request: EmbedRequest) -> list[list[Chunk]]:
        """The pieces of some of the request's texts that the model can read whole; raises InvalidRequest."""

    def embed_tokens(self, texts: Sequence[str], request: TokenVectorsRequest) -> list[Vectors]:
        """The vectors of each text's tokens, of shape (tokens, dimension); raises InvalidRequest."""

    def forward_exact(self, one: Rows) -> Vectors:
        """The vector of one text, of shape (1, dimension), computed in float32 throughout."""
