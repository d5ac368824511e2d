"""The engine: the web half's only interface to a model, whether it runs in this process or another."""

from typing import Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
# How long an answer may still be in transit after the request's deadline.
GRACE_SECONDS = 0.25

State = Literal["loading", "healthy", "unhealthy", "draining"]


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Texts to embed, and how. `deadline` is in seconds on the clock of `time.monotonic()`.

    `prompt` is put in front of each text as it is; `prompt_name` and `input_type` choose one of the model's.
    A background request waits for all others. `truncation_side` is the end at which over-long texts are
    truncated, by default the tokenizer's choice.
    """

    texts: list[str]
    deadline: float
    normalize: bool = True
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    dimensions: int | None = None
    truncate: bool = True
    truncation_side: Literal["left", "right"] | None = None
    prompt: str | None = None
    priority: Literal["normal", "background"] = "normal"


class Timings(msgspec.Struct, frozen=True, array_like=True):
    """How long each phase of a request took, in milliseconds."""

    tokenization_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: `vectors` is float32 of shape (texts, dimension), in the order of the request's texts.

    `tokens` counts what the model read, special tokens and prompt included;
    `truncated` lists the indices of the texts that were cut; `cache_hits` counts those that a cache
    answered, and is None if there is no cache. `chunks` counts the pieces that over-long texts were
    embedded in, one for each other text; it is None if texts were not cut into pieces.
    """

    vectors: Vectors
    tokens: int
    truncated: list[int]
    timings: Timings
    cache_hits: int | None = None
    chunks: int | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts of any length to split into tokens; `deadline` as in EmbedRequest."""

    texts: list[str]
    deadline: float
    add_special_tokens: bool = True


class TokenizedText(msgspec.Struct, frozen=True, array_like=True):
    """The tokens of one text; token i is its characters from `starts[i]` to before `stops[i]`.

    `special` lists index and name of each token without characters, such as [CLS].
    """

    ids: list[int]
    starts: list[int]
    stops: list[int]
    special: dict[int, str]


class Int8Ranges(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest and largest number of each dimension in the normalised vectors of calibration texts.

    `fingerprint` is that of the model that made the vectors.
    """

    fingerprint: str
    minimum: list[float]
    maximum: list[float]


class TokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to embed token by token; fields as in EmbedRequest. Over-long texts are truncated."""

    texts: list[str]
    deadline: float
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    prompt: str | None = None


class TokenVectors(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors of all tokens, float32 of shape (tokens, dimension), and the number of tokens per text."""

    vectors: Vectors
    counts: list[int]


class SplitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to cut into pieces that fit the model with the prompt in front.

    Neighbouring pieces share at most `overlap` tokens. `deadline` and the prompt as in EmbedRequest.
    """

    texts: list[str]
    deadline: float
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    prompt: str | None = None
    overlap: int = 0


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a text: its characters from `start` to before `stop`, and how many tokens they are."""

    start: int
    stop: int
    tokens: int


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The loaded model and how it runs."""

    model_name: str
    origin: str
    revision: str | None
    embedding_dimension: int
    max_seq_length: int
    device: str
    dtype: str
    backend: str
    pooling: str
    prompts: dict[str, str]
    batch_size: int
    max_batch_tokens: int
    fingerprint: str
    # For int8 and uint8 vectors, if INT8_RANGES is set; then the fingerprint covers them too.
    int8_ranges: Int8Ranges | None = None
    # True if texts are not truncated to `max_seq_length`, as in static embedding models.
    reads_whole_texts: bool = False
    # The prompt for requests that do not name one.
    default_prompt_name: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state; `info` is set once a model is loaded."""

    state: State
    reason: str = ""
    info: ModelInfo | None = None


class Engine(Protocol):
    """One model, here or in another process. Safe to call from any thread."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed the texts. Returns, or raises a ServiceError, by the request's deadline."""

    def tokenize(self, request: TokenizeRequest) -> list[TokenizedText]:
        """The tokens of the untruncated texts. Returns or raises as `embed` does."""

    def embed_tokens(self, request: TokensRequest) -> TokenVectors:
        """A vector for each token. Returns or raises as `embed` does."""

    def split(self, request: SplitRequest) -> list[list[Chunk]]:
        """The pieces of each text. Returns or raises as `embed` does."""

    def status(self) -> Status:
        """The state of the model; never blocks."""

    def must_restart(self) -> bool:
        """Whether the engine can recover only in a new process."""

    def close(self) -> None:
        """Release the model's resources."""
