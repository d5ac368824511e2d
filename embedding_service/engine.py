"""The engine: the web half's only interface to a model, whether it runs in this process or another."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from embedding_service.errors import ServiceError, TooLarge

Vectors = npt.NDArray[np.float32]
# How long an answer may still be in transit after the request's deadline.
GRACE_SECONDS = 0.25

# A text, or the ids of its tokens in the model's own vocabulary.
TokenIds = tuple[int, ...]
Text = str | TokenIds

State = Literal["loading", "healthy", "unhealthy", "draining"]
Overflow = Literal["truncate", "error", "mean", "chunks"]


class Timings(msgspec.Struct, frozen=True, array_like=True):
    """How long each phase of a request took, in milliseconds."""

    tokenization_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a text: its characters from `start` to before `stop`, and how many tokens they are."""

    start: int
    stop: int
    tokens: int


class TextError(msgspec.Struct, frozen=True, array_like=True):
    """Why a text has no vector: `error_type` and `reason` of a ServiceError."""

    index: int
    error_type: str
    reason: str


class Embeddings(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="embed"):
    """`vectors` is float32 of shape (texts, dimension), in the order of the request's texts.

    `tokens` counts what the model read, special tokens and prompt included;
    `truncated` lists the indices of the texts that were cut; `cache_hits` counts those that a cache
    answered, and is None if there is no cache. `chunks` holds the pieces of each text if over-long texts
    were embedded in pieces; with overflow "chunks" there is a row for each piece. With on_error "null",
    `errors` lists the texts without a vector: their rows are NaN, and they have no pieces.
    """

    vectors: Vectors
    tokens: int
    truncated: list[int]
    timings: Timings
    cache_hits: int | None = None
    chunks: list[list[Chunk]] | None = None
    errors: list[TextError] = []


class TokenizedText(msgspec.Struct, frozen=True, array_like=True):
    """The tokens of one text; token i is its characters from `starts[i]` to before `stops[i]`.

    `special` lists index and name of each token without characters, such as [CLS].
    """

    ids: list[int]
    starts: list[int]
    stops: list[int]
    special: dict[int, str]


class TokenLists(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """The tokens of each text."""

    texts: list[TokenizedText]


class TokenVectors(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="token vectors"):
    """The vectors of all tokens, float32 of shape (tokens, dimension), and the number of tokens per text."""

    vectors: Vectors
    counts: list[int]


class DecodedTexts(msgspec.Struct, frozen=True, array_like=True, tag="decoded"):
    """The text of each list of token ids."""

    texts: list[str]


Answer = Embeddings | TokenLists | TokenVectors | DecodedTexts
Outcome = Answer | ServiceError
# Receives outcomes that finished together, each with the number of its request.
Receiver = Callable[[Sequence[tuple[int, Outcome]]], None]
AnswerT = TypeVar("AnswerT", Embeddings, TokenLists, TokenVectors, DecodedTexts)


class Request(msgspec.Struct, Generic[AnswerT], frozen=True, kw_only=True, array_like=True):
    """Texts, and a `deadline` in seconds on the clock of `time.monotonic()`; the parameter is its answer."""

    texts: Sequence[Any]
    deadline: float


class EmbedRequest(Request[Embeddings], frozen=True, kw_only=True, array_like=True, tag="embed"):
    """Texts to embed, and how.

    Token ids are read as in Text Embeddings Inference: decoded, and tokenized again without special tokens,
    unless there is a prompt; then with special tokens, but without those among the ids.

    `prompt` is put in front of each text as it is; `prompt_name` and `input_type` choose one of the model's.
    A background request waits for all others. `truncation_side` is the end at which over-long texts are
    truncated, by default the tokenizer's choice.

    `overflow` says how to handle over-long texts: truncate them, fail, or embed them in pieces, of which
    neighbours share at most `overlap` tokens, and return their mean or the vector of each. A request that
    makes more than `max_chunks` pieces fails. With `on_error` "null" a text that fails, or that has more than
    `max_characters`, does not fail the others.
    """

    texts: Sequence[Text]
    normalize: bool = True
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    dimensions: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    prompt: str | None = None
    priority: Literal["normal", "background"] = "normal"
    overflow: Overflow = "truncate"
    overlap: int = 0
    max_chunks: int | None = None
    on_error: Literal["fail", "null"] = "fail"
    max_characters: int | None = None


class ListTokensRequest(Request[TokenLists], frozen=True, kw_only=True, array_like=True, tag="tokens"):
    """Texts of any length to split into tokens."""

    texts: Sequence[str]
    add_special_tokens: bool = True


class DecodeRequest(Request[DecodedTexts], frozen=True, kw_only=True, array_like=True, tag="decode"):
    """Token ids to decode."""

    texts: Sequence[Text]
    skip_special_tokens: bool = True


class TokenVectorsRequest(
    Request[TokenVectors], frozen=True, kw_only=True, array_like=True, tag="token vectors"
):
    """Texts to embed token by token; the prompt as in EmbedRequest. Over-long texts are truncated."""

    texts: Sequence[Text]
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    prompt: str | None = None


AnyRequest = EmbedRequest | ListTokensRequest | TokenVectorsRequest | DecodeRequest


class Int8Ranges(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest and largest number of each dimension in the normalised vectors of calibration texts.

    `fingerprint` is that of the model that made the vectors.
    """

    fingerprint: str
    minimum: list[float]
    maximum: list[float]


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
    # The kind of transformer, in the words of its configuration, the number of its weights, and their size.
    architecture: str = ""
    parameters: int = 0
    size_bytes: int = 0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state; `info` is set once a model is loaded, and `devices` if there are several processes.

    Then there is the device and the state of each.
    """

    state: State
    reason: str = ""
    info: ModelInfo | None = None
    devices: list[tuple[str, State]] = []


class Engine(Protocol):
    """One model, here or in another process. Safe to call from any thread."""

    def call(self, request: Request[AnswerT]) -> AnswerT:
        """The answer. Returns, or raises a ServiceError, by the request's deadline."""

    def status(self) -> Status:
        """The state of the model; never blocks."""

    def must_restart(self) -> bool:
        """Whether the engine can recover only in a new process."""

    def close(self) -> None:
        """Release the model's resources."""


def check_characters(texts: Sequence[Text], most: int) -> None:
    """Raises TooLarge if a text has more than `most` characters, or token ids."""
    if len(max(texts, key=len)) > most:
        index = next(i for i, text in enumerate(texts) if len(text) > most)
        unit = "characters" if isinstance(texts[index], str) else "token ids"
        reason = f"has {len(texts[index])} {unit}; at most {most} are allowed (MAX_TEXT_CHARACTERS)"
        raise TooLarge(reason, index=index)
