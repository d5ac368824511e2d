"""The two embedders: a service at a URL, and an engine in this process. Both raise ServiceError."""

import base64
import contextlib
import sys
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import Literal, Protocol, TypeVar

import httpx2
import msgspec
import numpy as np

from embedding_service.engine import EmbedRequest, Engine, Overflow, Vectors, check_characters
from embedding_service.errors import ServiceError, StartupError, Unavailable

# A request may wait in the service's queue behind many others.
REQUEST_SECONDS = 600.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options that apply to every text."""

    input_type: Literal["query", "document"] | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    dimensions: int | None = None
    overflow: Overflow | None = None
    chunk_overlap: int | None = None
    priority: Literal["background"] | None = None


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The embedder's model, and how many texts it accepts at once."""

    model: str
    fingerprint: str
    most_texts: int


Span = tuple[int, int]


class Embedded(msgspec.Struct, frozen=True):
    """A vector for each text, and how many texts were truncated.

    With `--overflow chunks` there is a vector for each chunk, and `chunks` holds the range of characters of
    each text's chunks.
    """

    vectors: Vectors
    truncated: int
    chunks: list[list[Span]] | None = None


class Embedder(Protocol):
    """Embeds texts; safe to use from several threads."""

    def describe(self) -> Description:
        """Raises a ServiceError."""

    def embed(self, texts: list[str]) -> Embedded:
        """Raises a ServiceError."""

    def close(self) -> None:
        """Release its resources."""


class Stopped(Exception):
    """The run cannot continue; the rows written so far are kept."""


class Lost(ServiceError):
    """Nothing answered at the URL, or something other than this service did."""

    status = 503
    error_type = "unavailable"


class Answered(ServiceError):
    """An error response from the service."""

    def __init__(self, error: "_Error", status: int, retry_after_seconds: float | None) -> None:
        about_text = error.index is not None and error.reason is not None
        super().__init__(
            error.reason if about_text and error.reason else error.error,
            index=error.index if about_text else None,
            field=error.field if about_text else None,
            retry_after_seconds=retry_after_seconds,
        )
        self.status = status


class _Error(msgspec.Struct):
    error: str
    field: str | None = None
    index: int | None = None
    reason: str | None = None


class _Info(msgspec.Struct):
    model_name: str
    fingerprint: str
    max_client_batch_size: int


class _Usage(msgspec.Struct):
    truncated: list[int]


class _Chunk(msgspec.Struct):
    text: int
    start: int
    end: int


class _Answer(msgspec.Struct):
    embeddings: list[str]
    usage: _Usage
    chunks: list[_Chunk] | None = None


Answer = TypeVar("Answer")


class RemoteEmbedder:
    """The service at `url`, over HTTP; `transport` is for tests."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        options: Options,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._url = (url if "://" in url else f"http://{url}").rstrip("/") + "/"
        self._options = {k: v for k, v in msgspec.to_builtins(options).items() if v is not None}
        try:
            self._client = httpx2.Client(
                base_url=self._url,
                headers={b"Authorization": f"Bearer {api_key}".encode()} if api_key else {},
                timeout=httpx2.Timeout(REQUEST_SECONDS, connect=10.0),
                transport=transport,
            )
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise StartupError(f"--url {url!r} or the API key cannot be used: {error}") from None

    def describe(self) -> Description:
        info = self._ask("GET", "info", None, _Info)
        # From now on another model refuses, rather than to mix its vectors with those of this one.
        self._client.headers.setdefault("x-expect-fingerprint", info.fingerprint)
        return Description(
            model=info.model_name, fingerprint=info.fingerprint, most_texts=info.max_client_batch_size
        )

    def embed(self, texts: list[str]) -> Embedded:
        body = msgspec.json.encode({"texts": texts, "encoding_format": "base64"} | self._options)
        answer = self._ask("POST", "embed", body, _Answer)
        count, chunks = len(texts), None
        if self._options.get("overflow") == "chunks":
            found = answer.chunks or []
            own = [(text, list(group)) for text, group in groupby(found, lambda chunk: chunk.text)]
            if [text for text, _ in own] != list(range(len(texts))):
                raise Lost(f"{self._url} answered with chunks of other texts")
            count = len(found)
            chunks = [[(chunk.start, chunk.end) for chunk in group] for _, group in own]
        if len(answer.embeddings) != count:
            what = "texts" if chunks is None else "chunks"
            raise Lost(f"{self._url} answered {count} {what} with {len(answer.embeddings)} vectors")
        raw = b"".join(base64.b64decode(vector) for vector in answer.embeddings)
        return Embedded(np.frombuffer(raw, "<f4").reshape(count, -1), len(answer.usage.truncated), chunks)

    def close(self) -> None:
        self._client.close()

    def _ask(self, method: str, path: str, body: bytes | None, kind: type[Answer]) -> Answer:
        try:
            response = self._client.request(
                method, path, content=body, headers={"Content-Type": "application/json"}
            )
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise StartupError(f"--url {self._url!r} cannot be used: {error}") from None
        except httpx2.TransportError as error:
            raise Lost(f"{self._url} does not answer: {error or type(error).__name__}") from None
        if response.status_code != 200:
            raise Answered(_error(response), response.status_code, retry_after_seconds(response.headers))
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Lost(f"{self._url}{path} does not look like this service: {error}") from None


class LocalEmbedder:
    """An engine in this process, with the service's limits."""

    def __init__(self, engine: Engine, options: Options, max_text_characters: int) -> None:
        self._engine = engine
        self._options = options
        self._max_text_characters = max_text_characters

    def describe(self) -> Description:
        info = self._engine.status().info
        if info is None:
            raise Unavailable(self._engine.status().reason)
        return Description(model=info.model_name, fingerprint=info.fingerprint, most_texts=sys.maxsize)

    def embed(self, texts: list[str]) -> Embedded:
        check_characters(texts, self._max_text_characters)
        options = self._options
        request = EmbedRequest(
            texts=texts,
            deadline=time.monotonic() + REQUEST_SECONDS,
            input_type=options.input_type,
            prompt_name=options.prompt_name,
            prompt=options.prompt,
            dimensions=options.dimensions,
            overflow=options.overflow or "truncate",
            overlap=options.chunk_overlap or 0,
        )
        try:
            result = self._engine.call(request)
        except Unavailable as error:
            if self._engine.must_restart():
                raise Stopped(f"the model is lost: {error.message}") from None
            raise
        spans = None
        if options.overflow == "chunks" and result.chunks is not None:
            spans = [[(chunk.start, chunk.stop) for chunk in chunks] for chunks in result.chunks]
        return Embedded(result.vectors, len(result.truncated), spans)

    def close(self) -> None:
        self._engine.close()


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The wait that the response asks for: `retry-after-ms`, else Retry-After in seconds or as a date."""
    with contextlib.suppress(KeyError, ValueError):
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    value = headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _error(response: httpx2.Response) -> _Error:
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode(response.content, type=_Error)
    return _Error(f"HTTP {response.status_code}")
