"""A stream: one session of a backend, and the packing of the batches that it runs."""

import numpy as np

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Session
from embedding_service.inference.preprocessing import Preprocessor
from embedding_service.inference.tokenized import Batch, Rows, TokenizedTexts


class SessionStream:
    """Packs a batch and runs it in a session that is this stream's own."""

    def __init__(self, preprocessor: Preprocessor, session: Session) -> None:
        self._preprocessor = preprocessor
        self._session = session
        # For a model whose vectors change with padding, as FNet's do, which reads no attention mask.
        self.without_padding = False

    def forward(self, batch: Batch) -> Vectors:
        if not self.without_padding:
            return self._session.run(self._preprocessor.pack(batch))
        lengths = np.concatenate([part.lengths for part in batch])
        found = []
        for length in np.unique(lengths):
            equal = [Rows(part.tokenized, part.rows[part.lengths == length]) for part in batch]
            found.append(
                self._session.run(self._preprocessor.pack([part for part in equal if len(part.rows)]))
            )
        # They are in the order of their lengths.
        vectors: Vectors = np.concatenate(found)[lengths.argsort(kind="stable").argsort()]
        return vectors

    def record_ahead(self, text: TokenizedTexts, max_seq_length: int, max_batch_tokens: int) -> None:
        """Let the session prepare for batches of other sizes; `text` is a single one."""
        self._session.record_ahead(
            self._preprocessor.pack([Rows.all_of(text)]), max_seq_length, max_batch_tokens
        )
