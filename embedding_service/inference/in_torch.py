"""What is computed in torch whatever the backend: token vectors, and vectors in float32 throughout."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from embedding_service.engine import Text, Vectors
from embedding_service.errors import InvalidRequest, ModelFailure, StartupError
from embedding_service.inference.preprocessing import Features, Preprocessor, check_unicode
from embedding_service.inference.streams import SessionStream
from embedding_service.inference.tokenized import Rows

if TYPE_CHECKING:
    from embedding_service.inference.checkpoint import Checkpoint


log = logging.getLogger(__name__)


class InTorch:
    """Safe from any thread. `read` is called when the model is first needed."""

    def __init__(self, read: "Callable[[], Checkpoint]", preprocessor: Preprocessor) -> None:
        self._read = read
        self._preprocessor = preprocessor
        self._reading = threading.Lock()
        self._embedding_tokens = threading.Lock()
        self._computing = threading.Lock()

    def embed_tokens(self, texts: Sequence[Text], prompt: str | None) -> list[Vectors]:
        """As Exact.embed_tokens."""
        plain = [text for text in texts if isinstance(text, str)]
        check_unicode(plain)
        model: Any = self._loaded().model
        import torch

        with self._embedding_tokens, torch.inference_mode():
            if len(plain) == len(texts):
                found = model.encode(plain, prompt=prompt, output_value="token_embeddings")
            else:
                tokenized = self._preprocessor.prepare(texts, prompt)
                rows = [Rows(tokenized, np.array([row], np.int32)) for row in range(len(texts))]
                inputs = [self._preprocessor.pack([row]) for row in rows]
                found = [model(_on(model.device, each))["token_embeddings"][0] for each in inputs]
        if not all(isinstance(one, torch.Tensor) and one.ndim == 2 for one in found):
            raise InvalidRequest("this model has no vectors of tokens")
        return [one.float().cpu().numpy() for one in found]

    def forward(self, one: Rows) -> Vectors:
        """As Exact.forward."""
        with self._computing:
            return self._stream.forward([one])

    def _loaded(self) -> "Checkpoint":
        with self._reading:
            return self._checkpoint

    @cached_property
    def _checkpoint(self) -> "Checkpoint":
        log.info("Loading the model in torch, which token vectors and vectors that are not finite need")
        try:
            return self._read()
        except (ImportError, OSError, StartupError) as error:
            log.error("The model cannot be loaded in torch: %s", error)
            raise ModelFailure(f"needs the model in torch, which cannot be loaded: {error}") from None

    @cached_property
    def _stream(self) -> SessionStream:
        checkpoint = self._loaded()
        from embedding_service.inference.backends.torch import open_session

        model = checkpoint.in_float32()
        return SessionStream(self._preprocessor.for_copy(model), open_session(model))


def _on(device: Any, inputs: Features) -> Features:
    """The model's input as tensors on its device."""
    import torch

    return {
        name: torch.as_tensor(each).to(device) if name != "prompt_length" else each
        for name, each in inputs.items()
    }
