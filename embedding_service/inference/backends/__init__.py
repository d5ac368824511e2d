"""The runtimes that can execute a model's forward pass; all answer with the same vectors."""

import sys
from dataclasses import dataclass
from typing import Any, Protocol

from embedding_service.engine import Vectors

# With this package OpenVINO reports its use to another host, at every start, from a child that it forks
# off this process with all its threads; such a child can hang, and stays behind since it ignores SIGTERM
# as we do. If the package cannot be imported, OpenVINO and nncf report nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


class Session(Protocol):
    """Executes one forward pass at a time, on a stream or cores of its own."""

    def run(self, features: dict[str, Any]) -> Vectors:
        """Sentence embeddings, float32 of shape (texts, dimension), on the CPU.

        `features` holds numpy arrays of shape (texts, width), or what the model's own `preprocess`
        returned. Raises OutOfMemory or DeviceLost.
        """


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The sessions that may run at once; `whole` has every core for a batch that is alone."""

    name: str
    version: str
    sessions: list[Session]
    whole: Session | None = None
