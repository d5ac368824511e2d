"""The runtimes that can execute a model's forward pass; all answer with the same vectors."""

import sys
from typing import Any, Protocol

from embedding_service.engine import Vectors

# With this package OpenVINO reports its use to another host, at every start, from a child that it forks
# off this process with all its threads; such a child can hang, and stays behind since it ignores SIGTERM
# as we do. Where the package cannot be imported, OpenVINO and nncf report nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


class Backend(Protocol):
    """Executes one batch."""

    name: str
    lanes: int
    cpu_batch_tokens: int

    def forward(self, features: dict[str, Any], lane: int = 0, alone: bool = True) -> Vectors:
        """Sentence embeddings, float32 of shape (texts, dimension), on the CPU.

        `features` holds numpy arrays of shape (texts, width), or what the model's own `preprocess`
        returned. Lanes may run at once, each with its own share of the cores; `alone` gives it all.
        """
