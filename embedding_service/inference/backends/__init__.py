"""The runtimes that can execute a model's forward pass; all answer with the same vectors."""

from typing import Any, Protocol

from embedding_service.engine import Vectors


class Backend(Protocol):
    """Executes one batch."""

    name: str

    def forward(self, features: dict[str, Any]) -> Vectors:
        """Sentence embeddings, float32 of shape (texts, dimension), on the CPU.

        `features` holds numpy arrays of shape (texts, width), or what the model's own `preprocess`
        returned.
        """
