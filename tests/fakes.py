"""An engine without a model, for tests of the HTTP half only."""

import threading
from typing import Any

import numpy as np
from werkzeug.serving import make_server

from embedding_service.engine import (
    DecodedTexts,
    DecodeRequest,
    Embeddings,
    EmbedRequest,
    Engine,
    ListTokensRequest,
    ModelInfo,
    Request,
    Status,
    Timings,
    TokenizedText,
    TokenLists,
    TokenVectors,
    TokenVectorsRequest,
)
from embedding_service.settings.config import Config
from embedding_service.web.factory import create_app

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
    architecture="bert",
    parameters=22_713_216,
    size_bytes=90_852_864,
)

# A body for each route that uses the engine.
BODIES = {
    "/embed": {"texts": "x"},
    "/": {"inputs": "x"},
    "/v1": {"inputs": "x"},
    "/tokenize": {"inputs": "x"},
    "/decode": {"ids": [120]},
    "/similarity": {"inputs": {"source_sentence": "x", "sentences": ["x"]}},
    "/v1/embeddings": {"input": "x"},
    "/embeddings": {"input": "x"},
    "/api/embed": {"input": "x"},
    "/api/embeddings": {"prompt": "x"},
    "/vectors": {"text": "x"},
    "/v1/embed": {"texts": ["x"]},
    "/v2/embed": {"texts": ["x"]},
    "/embed_all": {"inputs": "x"},
    "/invocations": {"inputs": "x"},
    "/predict": {"instances": [{"inputs": "x"}]},
    "/vertex": {"instances": [{"inputs": "x"}]},
    "/models/{name}": {"inputs": "x"},
    "/pipeline/feature-extraction/{name}": {"inputs": "x"},
    "/pipeline/sentence-similarity/{name}": {"inputs": {"source_sentence": "x", "sentences": ["x"]}},
    "/openai/deployments/{name}/embeddings": {"input": "x"},
    "/openai/v1/embeddings": {"input": "x"},
    "/v1/tokenize": {"text": "x"},
}


class FakeEngine:
    """Embeds a text as (its length, 0, 1), and each of its characters so, as a token.

    It remembers the requests, or raises `error`.
    """

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

    def call(self, request: Request[Any]) -> Any:
        if isinstance(request, TokenVectorsRequest):
            return self.embed_tokens(request)
        if isinstance(request, ListTokensRequest):
            return self.list_tokens(request)
        if isinstance(request, DecodeRequest):
            return self.decode(request)
        assert isinstance(request, EmbedRequest)
        return self.embed(request)

    def embed_tokens(self, request: TokenVectorsRequest) -> TokenVectors:
        if self.error is not None:
            raise self.error
        counts = [len(text) for text in request.texts]
        return TokenVectors(
            vectors=np.array([[count, 0, 1] for count in counts for _ in range(count)], np.float32),
            counts=counts,
        )

    def list_tokens(self, request: ListTokensRequest) -> TokenLists:
        if self.error is not None:
            raise self.error
        return TokenLists(
            [
                TokenizedText(
                    ids=[ord(each) for each in text],
                    starts=list(range(len(text))),
                    stops=list(range(1, len(text) + 1)),
                    special={},
                )
                for text in request.texts
            ]
        )

    def decode(self, request: DecodeRequest) -> DecodedTexts:
        if self.error is not None:
            raise self.error
        return DecodedTexts(["".join(map(chr, ids)) for ids in request.texts])

    def status(self) -> Status:
        return self.current

    def must_restart(self) -> bool:
        return self.restart

    def close(self) -> None:
        pass


class Served:
    """The real Flask app over an engine, on a real port."""

    def __init__(self, engine: Engine, **settings: Any) -> None:
        self.engine = engine
        app = create_app(engine, Config(**settings))
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
