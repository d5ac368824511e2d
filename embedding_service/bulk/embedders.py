"""The two embedders: a service at a URL, and an engine in this process. Both raise ServiceError."""

import base64
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import Any, TypeVar

import httpx2
import msgspec
import numpy as np

from embedding_service.engine import EmbedRequest, Engine, Vectors, check_characters
from embedding_service.errors import ServiceError, StartupError, Unavailable

# A request may wait in the service's queue behind many others.
REQUEST_SECONDS = 600.0

# Fields of the service's own requests that apply to every text.
Options = dict[str, Any]


# The first character of a chunk and the one after its last; None for a whole text.
Span = tuple[int | None, int | None]


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The embedder's model, and how many texts it accepts at once."""

    model_name: str
    fingerprint: str
    max_client_batch_size: int


class Embedding(msgspec.Struct, frozen=True):
    """One text's vector, or the vectors of its chunks, with the range of characters of each."""

    vectors: Vectors
    spans: Sequence[Span] = ((None, None),)
    is_truncated: bool = False


class Stopped(Exception):
    """The run cannot continue; the rows written so far are kept."""


class Lost(ServiceError, status=503, error_type="unavailable"):
    """Nothing answered at the URL, or something other than this service did."""


class _Error(msgspec.Struct):
    error: str
    field: str | None = None
    index: int | None = None
    reason: str | None = None


class _Usage(msgspec.Struct):
    truncated: list[int]


class _Chunk(msgspec.Struct):
    text: int
    start: int
    end: int


class _Answer(msgspec.Struct):
    embeddings: list[str]
    usage: _Usage
    chunks: list[_Chunk] = []


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
        self._options = options | {"encoding_format": "base64"}
        headers = {b"Content-Type": b"application/json"}
        try:
            if api_key:
                headers[b"Authorization"] = f"Bearer {api_key}".encode()
            self._client = httpx2.Client(
                base_url=self._url,
                headers=headers,
                timeout=httpx2.Timeout(REQUEST_SECONDS, connect=10.0),
                transport=transport,
            )
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise StartupError(f"--url {url!r} or the API key cannot be used: {error}") from None

    def describe(self) -> Description:
        description = self._ask("GET", "info", None, Description)
        # From now on another model refuses, rather than to mix its vectors with those of this one.
        self._client.headers.setdefault("x-expect-fingerprint", description.fingerprint)
        return description

    def embed(self, texts: list[str]) -> list[Embedding]:
        answer = self._ask("POST", "embed", msgspec.json.encode({"texts": texts} | self._options), _Answer)
        count, spans = len(texts), None
        if self._options.get("overflow") == "chunks":
            count, by_text = len(answer.chunks), groupby(answer.chunks, lambda chunk: chunk.text)
            numbered = [(text, [(chunk.start, chunk.end) for chunk in group]) for text, group in by_text]
            if [text for text, _ in numbered] != list(range(len(texts))):
                raise Lost(f"{self._url} answered with chunks of other texts")
            spans = [chunks for _, chunks in numbered]
        if len(answer.embeddings) != count:
            what = "texts" if spans is None else "chunks"
            raise Lost(f"{self._url} answered {count} {what} with {len(answer.embeddings)} vectors")
        raw = b"".join(base64.b64decode(vector) for vector in answer.embeddings)
        return _by_text(np.frombuffer(raw, "<f4").reshape(count, -1), spans, answer.usage.truncated)

    def close(self) -> None:
        self._client.close()

    def _ask(self, method: str, path: str, body: bytes | None, kind: type[Answer]) -> Answer:
        try:
            response = self._client.request(method, path, content=body)
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise StartupError(f"--url {self._url!r} cannot be used: {error}") from None
        except httpx2.TransportError as error:
            raise Lost(f"{self._url} does not answer: {error or type(error).__name__}") from None
        if response.status_code != 200:
            raise _refusal(response)
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Lost(f"{self._url}{path} does not look like this service: {error}") from None


class LocalEmbedder:
    """An engine in this process, with the service's limits."""

    def __init__(self, engine: Engine, options: Options, max_text_characters: int) -> None:
        self._engine = engine
        self._max_text_characters = max_text_characters
        overlap = {"overlap": options["chunk_overlap"]} if "chunk_overlap" in options else {}
        fields = {name: value for name, value in options.items() if name != "chunk_overlap"}
        self._request = EmbedRequest(texts=[], deadline=0, **fields, **overlap)

    def describe(self) -> Description:
        info = self._engine.status().info
        if info is None:
            raise Unavailable(self._engine.status().reason)
        return Description(
            model_name=info.model_name, fingerprint=info.fingerprint, max_client_batch_size=sys.maxsize
        )

    def embed(self, texts: list[str]) -> list[Embedding]:
        check_characters(texts, self._max_text_characters)
        deadline = time.monotonic() + REQUEST_SECONDS
        try:
            result = self._engine.call(msgspec.structs.replace(self._request, texts=texts, deadline=deadline))
        except Unavailable as error:
            if self._engine.must_restart():
                raise Stopped(f"the model is lost: {error.message}") from None
            raise
        spans = None
        if self._request.overflow == "chunks" and result.chunks is not None:
            spans = [[(chunk.start, chunk.stop) for chunk in chunks] for chunks in result.chunks]
        return _by_text(result.vectors, spans, result.truncated)

    def close(self) -> None:
        self._engine.close()


Embedder = RemoteEmbedder | LocalEmbedder


def _by_text(
    vectors: Vectors, spans: list[list[tuple[int, int]]] | None, truncated: list[int]
) -> list[Embedding]:
    """The vectors of each text: one, or one for each of its spans."""
    if spans is None:
        return [Embedding(vectors[i : i + 1], is_truncated=i in truncated) for i in range(len(vectors))]
    parts = np.split(vectors, np.cumsum([len(chunks) for chunks in spans])[:-1])
    return [Embedding(part, chunks) for part, chunks in zip(parts, spans, strict=True)]


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The wait that the response asks for: `retry-after-ms`, else Retry-After in seconds or as a date."""
    value = headers.get("Retry-After", "")
    readers: list[Callable[[], float]] = [
        lambda: float(headers["retry-after-ms"]) / 1000,
        lambda: float(value),
        lambda: parsedate_to_datetime(value).timestamp() - time.time(),
    ]
    for read in readers:
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, read())
    return None


def _refusal(response: httpx2.Response) -> ServiceError:
    error = _Error(f"HTTP {response.status_code}")
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        error = msgspec.json.decode(response.content, type=_Error)
    wait = retry_after_seconds(response.headers)
    if error.index is not None and error.reason:
        refusal = ServiceError(error.reason, index=error.index, field=error.field, retry_after_seconds=wait)
    else:
        refusal = ServiceError(error.error, retry_after_seconds=wait)
    refusal.status = response.status_code
    return refusal
