"""A runtime without a model, which does what hardware will not do on request, for tests of the batcher."""

import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from embedding_service.engine import Embeddings, EmbedRequest, ModelInfo, Vectors
from embedding_service.errors import InvalidRequest, ServiceError
from embedding_service.inference.runtime import Tokens

DIMENSION = 8
LOG_NORMAL = (3.2, 0.8)  # of tokens a text: median 25, one text in a hundred over 150


class FakeRuntime:
    """A text "17 some words" has 17 tokens; its vector follows from its characters alone.

    `on_forward` sees every batch before it runs and may raise, wait, or return vectors of its own.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int = 256,
        max_seq_length: int = 256,
        free_padding_tokens: int = 16,
        separate_bulk: bool = False,
        on_forward: Callable[[Sequence[Tokens]], Vectors | None] = lambda _batch: None,
        on_tokenize: Callable[[Sequence[str]], None] = lambda _texts: None,
        seconds_per_token: float = 0.0,
        lanes: int = 1,
    ) -> None:
        self.max_seq_length = max_seq_length
        self.max_batch_tokens = max_batch_tokens
        self.free_padding_tokens = free_padding_tokens
        self.separate_bulk = separate_bulk
        self.normalized = False
        self.lanes = lanes
        self.on_forward = on_forward
        self.on_tokenize = on_tokenize
        self.seconds_per_token = seconds_per_token
        self.batches: list[list[Tokens]] = []
        self.exact: list[Tokens] = []
        self.tokenized: list[str] = []
        self.info = ModelInfo(
            model_name="fake",
            origin="tests",
            revision=None,
            embedding_dimension=DIMENSION,
            max_seq_length=max_seq_length,
            device="cpu",
            dtype="float32",
            backend="fake",
            pooling="mean",
            prompts={},
            batch_size=32,
            max_batch_tokens=max_batch_tokens,
            fingerprint="0",
        )

    def prompt(self, prompt_name: str | None, input_type: str | None) -> str | None:
        if prompt_name is not None:
            raise InvalidRequest(f"prompt_name {prompt_name!r} is unknown")
        return None

    def tokenize(
        self, texts: Sequence[str], prompt: str | None, task: str | None, side: str | None = None
    ) -> list[Tokens]:
        self.on_tokenize(texts)
        self.tokenized += texts
        wanted = [int(text.split(" ")[0]) for text in texts]
        most = self.max_seq_length
        return [
            Tokens(ids=None, length=min(length, most), truncated=length > most, group=None, text=text)
            for length, text in zip(wanted, texts, strict=True)
        ]

    def forward(self, batch: Sequence[Tokens], lane: int = 0, alone: bool = True) -> Vectors:
        self.batches.append(list(batch))
        own = self.on_forward(batch)
        if self.seconds_per_token:
            time.sleep(self.seconds_per_token * padded(batch))
        return own if own is not None else np.stack([vector_of(tokens.text) for tokens in batch])

    def forward_exact(self, tokens: Tokens) -> Vectors:
        self.exact.append(tokens)
        return vector_of(tokens.text)[None]


def vector_of(text: str) -> Vectors:
    """The vector that belongs to a text and to no other."""
    return np.random.default_rng(list(text.encode())).standard_normal(DIMENSION).astype(np.float32)


def padded(batch: Sequence[Tokens]) -> int:
    """Tokens that a batch makes the model compute, padding included."""
    return max(tokens.length for tokens in batch) * len(batch)


def text(tokens: int, name: object = "") -> str:
    """A text of so many tokens."""
    return f"{tokens} {name}"


def lengths(seed: int, count: int, most: int = 256) -> list[int]:
    """Log-normal lengths, as sentences and paragraphs in the wild have them."""
    random_numbers = random.Random(seed)
    return [min(most, max(3, round(random_numbers.lognormvariate(*LOG_NORMAL)))) for _ in range(count)]


def request(texts: Sequence[str], seconds: float = 30.0, **fields) -> EmbedRequest:
    """A request with so many seconds to its deadline."""
    return EmbedRequest(texts=list(texts), deadline=time.monotonic() + seconds, **fields)


class Answer:
    """The outcome of one submitted request, when it comes."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.outcomes: list[Embeddings | ServiceError] = []
        self.seconds = 0.0
        self._began = time.monotonic()

    def __call__(self, outcome: Embeddings | ServiceError) -> None:
        self.seconds = time.monotonic() - self._began
        self.outcomes.append(outcome)
        self._done.set()

    def wait(self, seconds: float = 20.0) -> Embeddings | ServiceError:
        assert self._done.wait(seconds), f"no outcome within {seconds} s"
        return self.outcomes[0]

    @property
    def done(self) -> bool:
        return self._done.is_set()


class Gate:
    """Holds the model's thread inside a batch until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._opened = threading.Event()

    def __call__(self, _batch: Sequence[Tokens]) -> None:
        self.entered.set()
        assert self._opened.wait(20)

    def open(self) -> None:
        self._opened.set()
