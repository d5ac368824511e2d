"""A lane: one session of a backend, and the packing of the batches that it runs."""

from embedding_service.engine import Vectors
from embedding_service.inference.backends import Session
from embedding_service.inference.preprocessing import Preprocessor
from embedding_service.inference.tokenized import Batch, Rows, TokenizedTexts


class SessionLane:
    """Packs a batch and runs it in a session that is this lane's own."""

    def __init__(self, preprocessor: Preprocessor, session: Session) -> None:
        self._preprocessor = preprocessor
        self._session = session

    def forward(self, batch: Batch) -> Vectors:
        return self._session.run(self._preprocessor.pack(batch))

    def record_ahead(self, text: TokenizedTexts, max_seq_length: int, max_batch_tokens: int) -> None:
        """Let the session prepare for batches of other sizes; `text` is a single one."""
        self._session.record_ahead(
            self._preprocessor.pack([Rows.all_of(text)]), max_seq_length, max_batch_tokens
        )
