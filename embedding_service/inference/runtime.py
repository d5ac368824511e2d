"""What the batcher asks of a model, and the two failures of a device that it knows how to meet."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from embedding_service.engine import ModelInfo, TokenizedText, Vectors


class OutOfMemory(Exception):
    """The batch did not fit in the device's memory; a smaller one may."""


class DeviceLost(Exception):
    """The device answers nothing any more in this process, whatever is asked of it."""


@dataclass(slots=True)
class Tokens:
    """One text as the model will read it.

    `length` counts its tokens, special ones included. Only texts of the same `group` may share a
    batch. `ids` is None where the model tokenises for itself, from `text`.
    """

    ids: list[int] | None
    length: int
    truncated: bool
    group: Hashable
    text: str = ""


class Runtime(Protocol):
    """A loaded model. `tokenize` is safe from any thread, `forward` from one thread for each lane."""

    lanes: int

    max_seq_length: int
    max_batch_tokens: int
    free_padding_tokens: int
    separate_bulk: bool
    normalized: bool
    info: ModelInfo

    def prompt(self, prompt_name: str | None, input_type: Literal["query", "document"] | None) -> str | None:
        """The text to put in front of each text; raises InvalidRequest for a name the model lacks."""

    def tokenize(
        self,
        texts: Sequence[str],
        prompt: str | None,
        task: str | None,
        side: Literal["left", "right"] | None = None,
    ) -> list[Tokens]:
        """Texts to tokens, cut at `side`; raises InvalidRequest, with the index, for what is not Unicode."""

    def list_tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenizedText]:
        """Every token of the texts, for a person to look at; raises InvalidRequest."""

    def forward(self, batch: Sequence[Tokens], lane: int = 0, alone: bool = True) -> Vectors:
        """Vectors of shape (len(batch), dimension); raises OutOfMemory or DeviceLost.

        `alone` says that no other lane runs or has anything to run.
        """

    def forward_exact(self, tokens: Tokens) -> Vectors:
        """The vector of one text, of shape (1, dimension), computed in float32 throughout."""
