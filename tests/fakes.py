"""An engine without a model, for tests of the HTTP half alone."""

import numpy as np

from embedding_service.engine import Embeddings, EmbedRequest, ModelInfo, Status, Timings

INFO = ModelInfo(
    model_name="fake/model",
    origin="nowhere",
    revision=None,
    embedding_dimension=3,
    max_seq_length=16,
    device="cpu",
    dtype="float32",
    backend="torch",
    pooling="mean",
    prompts={"query": "query: "},
    batch_size=32,
    max_batch_tokens=256,
    fingerprint="0123456789abcdef",
)


class FakeEngine:
    """Embeds a text as (its length, 0, 1); remembers the requests, or raises `error`."""

    def __init__(self) -> None:
        self.requests: list[EmbedRequest] = []
        self.error: Exception | None = None
        self.current = Status(state="healthy", info=INFO)
        self.restart = False

    def embed(self, request: EmbedRequest) -> Embeddings:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        vectors = np.array([[len(text), 0, 1] for text in request.texts], np.float32)
        return Embeddings(
            vectors=vectors[:, : request.dimensions],
            tokens=sum(map(len, request.texts)),
            truncated=[],
            timings=Timings(tokenization_ms=1, queue_ms=2, inference_ms=3),
        )

    def status(self) -> Status:
        return self.current

    def must_restart(self) -> bool:
        return self.restart

    def close(self) -> None:
        pass
