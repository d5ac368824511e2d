"""A runtime without a model, for tests of the batcher, which fails and waits on request."""

import random
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np

from embedding_service.engine import Embeddings, EmbedRequest, ModelInfo, Vectors
from embedding_service.errors import InvalidRequest, ServiceError
from embedding_service.inference.batcher import Batcher
from embedding_service.inference.budget import BatchBudget, BatchCost
from embedding_service.inference.model import Model
from embedding_service.inference.tokenized import Batch, Rows, TokenizedTexts

DIMENSION = 8
TOKEN_SECONDS = 1e-5  # what batches are said to cost
LOG_NORMAL = (3.2, 0.8)  # tokens per text: median 25, one text in a hundred over 150


class Text(NamedTuple):
    """One text of a batch."""

    text: str
    length: int
    group: Any


class FixedBudget(BatchBudget):
    """A fixed budget that records what it is told."""

    def __init__(self, tokens: int, overhead_tokens: int) -> None:
        super().__init__(
            BatchCost(overhead_tokens * TOKEN_SECONDS, TOKEN_SECONDS),
            max_seq_length=1,
            max_batch_tokens=tokens,
        )
        self.tokens = tokens
        self.observed: list[tuple[int, float]] = []

    def observe(self, tokens: int, seconds: float) -> None:
        self.observed.append((tokens, seconds))


class FakeStream:
    """Passes its batches to the runtime."""

    def __init__(self, runtime: "FakeRuntime", name: object) -> None:
        self.runtime, self.name = runtime, name

    def forward(self, batch: Batch) -> Vectors:
        return self.runtime.forward(batch, self)


class FakeRuntime(Model):
    """A text "17 some words" has 17 tokens; its vector follows from its characters alone.

    `on_forward` sees every batch before it runs and may raise, wait, or return vectors of its own.
    """

    budget: "FixedBudget"

    def __init__(
        self,
        *,
        max_batch_tokens: int = 256,
        max_seq_length: int = 256,
        overhead_tokens: int = 16,
        on_forward: Callable[[Sequence[Text]], Vectors | None] = lambda _batch: None,
        on_prepare: Callable[[Sequence[str]], None] = lambda _texts: None,
        seconds_per_token: float = 0.0,
        streams: int = 1,
        all_cores: bool = False,
        normalized: bool = False,
        on_cpu: bool = False,
    ) -> None:
        self.on_forward = on_forward
        self.on_prepare = on_prepare
        self.seconds_per_token = seconds_per_token
        self.batches: list[list[Text]] = []
        self.ran_on: list[object] = []
        self.exactly: list[Text] = []
        self.prepared: list[str] = []
        self.parallel: list[bool] = []
        info = ModelInfo(
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
        super().__init__(
            info=info,
            preprocessor=cast(Any, SimpleNamespace(prepare=self.prepare)),
            streams=[FakeStream(self, number) for number in range(streams)],
            all_cores=FakeStream(self, "all cores") if all_cores else None,
            exact=cast(Any, SimpleNamespace(forward=self.forward_exact)),
            budget=FixedBudget(max_batch_tokens, overhead_tokens),
            normalized=normalized,
            on_cpu=on_cpu,
        )

    def prompt(self, request) -> str | None:
        if request.prompt_name is not None:
            raise InvalidRequest(f"{request.prompt_name!r} is unknown", field="prompt_name")
        return request.prompt

    def prepare(
        self,
        texts: Sequence[str],
        prompt: str | None,
        task: str | None,
        side: str | None = None,
        *,
        parallel: bool = False,
    ) -> TokenizedTexts:
        self.on_prepare(texts)
        self.prepared += texts
        self.parallel.append(parallel)
        for index, text in enumerate(texts):
            if not text.isprintable():
                raise InvalidRequest("is not valid Unicode", index=index)
        wanted = np.array([self.length(text) for text in texts], np.int32)
        most = self.info.max_seq_length
        return TokenizedTexts(np.minimum(wanted, most), wanted > most, (task, side), texts=list(texts))

    def length(self, text: str) -> int:
        """How many tokens the text has."""
        return int(text.split(" ", 1)[0]) if text else 2

    def forward(self, batch: Batch, stream: FakeStream) -> Vectors:
        texts = texts_of(batch)
        self.batches.append(texts)
        self.ran_on.append(stream.name)
        own = self.on_forward(texts)
        if self.seconds_per_token:
            time.sleep(self.seconds_per_token * padded(texts))
        return own if own is not None else vectors_of(batch)

    def forward_exact(self, one: Rows) -> Vectors:
        self.exactly += texts_of([one])
        return vectors_of([one])


def texts_of(batch: Batch) -> list[Text]:
    """The texts of a batch, in order."""
    return [
        Text(one.tokenized.texts[row], int(one.tokenized.lengths[row]), one.tokenized.group)
        for one in batch
        for row in one.rows.tolist()
    ]


def vectors_of(batch: Batch) -> Vectors:
    """The vectors of a batch, which differ for each text, task and side."""
    return np.stack(
        [
            vector_of(one.tokenized.texts[row], *cast(Any, one.tokenized.group))
            for one in batch
            for row in one.rows.tolist()
        ]
    )


def vector_of(text: str, task: Hashable = None, side: str | None = None) -> Vectors:
    """The vector of a text, which no other text has."""
    seed = list(f"{text}|{task}|{side}".encode())
    return np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)


def padded(batch: Sequence[Text]) -> int:
    """Tokens that the model computes for a batch, including padding."""
    return max(text.length for text in batch) * len(batch)


def text(tokens: int, name: object = "") -> str:
    """A text with this many tokens."""
    return f"{tokens} {name}"


def lengths(seed: int, count: int, most: int = 256) -> list[int]:
    """Log-normal lengths, like those of real sentences and paragraphs."""
    random_numbers = random.Random(seed)
    return [min(most, max(3, round(random_numbers.lognormvariate(*LOG_NORMAL)))) for _ in range(count)]


def request(texts: Sequence[str], seconds: float = 120.0, **fields) -> EmbedRequest:
    """A request with this many seconds until its deadline."""
    return EmbedRequest(texts=list(texts), deadline=time.monotonic() + seconds, **fields)


class Answer:
    """A receiver of one request's outcome."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.outcomes: list[Embeddings | ServiceError] = []
        self.seconds = 0.0
        self._began = time.monotonic()

    def __call__(self, together: Sequence[tuple[int, Any]]) -> None:
        self.seconds = time.monotonic() - self._began
        self.outcomes += [outcome for _, outcome in together]
        self._done.set()

    def wait(self, seconds: float = 120.0) -> Embeddings | ServiceError:
        assert self._done.wait(seconds), f"no outcome within {seconds} s"
        return self.outcomes[0]

    def within(self, seconds: float) -> bool:
        """Whether there is an outcome, at least after this time."""
        return self._done.wait(seconds)

    @property
    def done(self) -> bool:
        return self._done.is_set()


def submit(batcher: Batcher, texts: Sequence[str], seconds: float = 120.0, **fields: Any) -> Answer:
    """Submit a request for the texts, with a deadline in this many seconds."""
    answer = Answer()
    batcher.submit([(0, request(texts, seconds, **fields))], answer)
    return answer


class Gate:
    """Holds the model's thread inside a batch until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._opened = threading.Event()

    def __call__(self, _batch: Sequence[Text]) -> None:
        self.entered.set()
        assert self._opened.wait(60)

    def open(self) -> None:
        self._opened.set()
