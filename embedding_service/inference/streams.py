"""A stream: one session of a backend, and the packing of the batches that it runs."""

from collections.abc import Callable
from typing import Any

import numpy as np

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Session
from embedding_service.inference.preprocessing import Preprocessor, RustTokenizer
from embedding_service.inference.tokenized import Batch, Rows


class SessionStream:
    """Packs a batch and runs it in a session that is this stream's own."""

    def __init__(self, preprocessor: Preprocessor, session: Session, *, pads: bool = False) -> None:
        """`pads` says that the session pads batches by itself, if the tokenizer leaves that to it."""
        self._pack: Callable[[Batch], Any] = preprocessor.pack
        if pads and isinstance(preprocessor, RustTokenizer):
            self._pack = preprocessor.pack_unpadded
        self._session = session
        # For a model whose vectors change with padding, as FNet's do, which reads no attention mask.
        self.without_padding = False

    def forward(self, batch: Batch) -> Vectors:
        if not self.without_padding:
            return self._session.run(self._pack(batch))
        lengths = np.concatenate([part.lengths for part in batch])
        found = []
        for length in np.unique(lengths):
            equal = [Rows(part.tokenized, part.rows[part.lengths == length]) for part in batch]
            found.append(self._session.run(self._pack([part for part in equal if len(part.rows)])))
        # They are in the order of their lengths.
        vectors: Vectors = np.concatenate(found)[lengths.argsort(kind="stable").argsort()]
        return vectors
