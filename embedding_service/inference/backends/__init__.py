"""The runtimes that can execute a model's forward pass; all answer with the same vectors."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from embedding_service.engine import Vectors

# At every start, this package reports OpenVINO's use to another host, from a child that it forks off this
# process with all its threads. Such a child can hang, and it remains, since it ignores SIGTERM as we do.
# If the package cannot be imported, OpenVINO and nncf report nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


class Session(Protocol):
    """Executes one forward pass at a time, on a stream or cores of its own."""

    def run(self, features: dict[str, Any]) -> Vectors:
        """Sentence embeddings, float32 of shape (texts, dimension), on the CPU.

        `features` holds numpy arrays of shape (texts, width), or what the model's own `preprocess`
        returned. Raises OutOfMemory or DeviceLost.
        """

    def record_ahead(self, example: dict[str, Any], max_width: int, max_tokens: int) -> None:
        """Prepare for batches of other sizes, if the runtime is faster for it.

        `example` holds the features of one text. No text has more than `max_width` tokens, and no batch
        more than `max_tokens`.
        """


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The sessions that may run at once; `all_cores` uses every core for a batch that runs alone.

    `rest` is called from time to time, and gives memory back if nothing has run for a while.
    """

    name: str
    version: str
    sessions: list[Session]
    all_cores: Session | None = None
    rest: Callable[[], None] = lambda: None
