"""What runs a batch, and the two device failures that the batcher can handle."""

from typing import Literal, Protocol

from embedding_service.engine import Vectors
from embedding_service.inference.tokenized import Batch

Side = Literal["left", "right"]


class OutOfMemory(Exception):
    """The batch did not fit in the device's memory; a smaller one may."""


class DeviceLost(Exception):
    """The device can no longer be used by this process."""


class Stream(Protocol):
    """Runs one batch at a time, on resources that no other stream uses."""

    def forward(self, batch: Batch) -> Vectors:
        """Vectors of shape (rows, dimension), in the order of the slices and their rows.

        Raises OutOfMemory or DeviceLost.
        """
