"""The runtimes that can execute a model's forward pass; all answer with the same vectors."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from embedding_service.engine import Vectors
from embedding_service.inference.preprocessing import Unpadded

# At every start, this package reports OpenVINO's use to another host, from a child that it forks off this
# process with all its threads. Such a child can hang, and it remains, since it ignores SIGTERM as we do.
# If the package cannot be imported, OpenVINO and nncf report nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


class Session(Protocol):
    """Executes one forward pass at a time, on a stream or cores of its own."""

    def run(self, features: Any) -> Vectors:
        """Sentence embeddings, float32 of shape (texts, dimension), on the CPU.

        `features` holds numpy arrays of shape (texts, width), or what the model's own `preprocess`
        returned, or is Unpadded, for a backend that pads. Raises OutOfMemory or DeviceLost.
        """


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The sessions that may run at once; `all_cores` uses every core for a batch that runs alone.

    A backend that `pads` takes batches without padding. `record` is called once the model is ready, with a
    batch of one text and the most tokens of a text and of a batch, and prepares for batches of other sizes.
    `rest` is called from time to time, and gives memory back if nothing has run for a while.
    """

    name: str
    version: str
    sessions: list[Session]
    all_cores: Session | None = None
    pads: bool = False
    record: Callable[[Unpadded, int, int], None] = lambda *_: None
    rest: Callable[[], None] = lambda: None
