"""The messages between web workers and a model process, and their framing on a unix socket.

A frame is two little-endian uint32, the sizes of what follows: a msgpack message, then raw float32
vectors (empty but for Replies). Nothing is ever pickled.
"""

import contextlib
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Self

import msgspec
import numpy as np

from embedding_service.engine import (
    Chunk,
    Embeddings,
    EmbedRequest,
    SplitRequest,
    Status,
    Timings,
    TokenizedText,
    TokenizeRequest,
    TokensRequest,
    TokenVectors,
)
from embedding_service.errors import BY_NAME, ServiceError

_SIZES = struct.Struct("<II")

BUFFER_BYTES = 1 << 16


class Call(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Web to model: embed this; `number` comes back with the answer."""

    number: int
    request: EmbedRequest


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """One embedded request without its vectors."""

    number: int
    texts: int
    dimension: int
    tokens: int
    truncated: list[int]
    timings: Timings
    cache_hits: int | None

    @classmethod
    def of(cls, number: int, result: Embeddings) -> Self:
        """The details of a result, without its vectors."""
        texts, dimension = result.vectors.shape
        return cls(
            number, texts, dimension, result.tokens, result.truncated, result.timings, result.cache_hits
        )


class Replies(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: all answers of a batch, followed by their vectors in the same order."""

    answers: list[Answer]

    def results(self, payload: Any) -> Iterator[tuple[int, Embeddings]]:
        """Each request's number and its result; the vectors are views of the payload."""
        numbers = np.frombuffer(payload, np.float32)
        first = 0
        for answer in self.answers:
            last = first + answer.texts * answer.dimension
            yield (
                answer.number,
                Embeddings(
                    vectors=numbers[first:last].reshape(answer.texts, answer.dimension),
                    tokens=answer.tokens,
                    truncated=answer.truncated,
                    timings=answer.timings,
                    cache_hits=answer.cache_hits,
                ),
            )
            first = last


class Tokenize(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Web to model: list the tokens of this."""

    number: int
    request: TokenizeRequest


class Tokenized(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: the tokens asked for."""

    number: int
    texts: list[TokenizedText]


class Split(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Web to model: cut these texts into pieces."""

    number: int
    request: SplitRequest


class Chunks(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: the pieces asked for."""

    number: int
    texts: list[list[Chunk]]


class CallTokens(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Web to model: embed the tokens of this."""

    number: int
    request: TokensRequest


class TokenReply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: how many vectors follow for each text, and of what dimension."""

    number: int
    counts: list[int]
    dimension: int

    def result(self, payload: Any) -> TokenVectors:
        """The answer; the vectors are a view of the payload."""
        vectors = np.frombuffer(payload, np.float32).reshape(-1, self.dimension)
        return TokenVectors(vectors=vectors, counts=self.counts)


class ErrorReply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: a ServiceError, by the name of its class."""

    number: int
    kind: str
    reason: str
    index: int | None
    field: str | None
    retry_after_seconds: float | None

    @classmethod
    def of(cls, number: int, error: ServiceError) -> Self:
        """The message that carries the error."""
        kind = type(error).__name__
        return cls(number, kind, error.reason, error.index, error.field, error.retry_after_seconds)

    def error(self) -> ServiceError:
        """The error that it carries."""
        return BY_NAME.get(self.kind, ServiceError)(
            self.reason,
            index=self.index,
            field=self.field,
            retry_after_seconds=self.retry_after_seconds,
        )


class StatusNotice(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: sent on connecting and at every change."""

    status: Status


Message = (
    Call
    | Replies
    | Tokenize
    | Tokenized
    | Split
    | Chunks
    | CallTokens
    | TokenReply
    | ErrorReply
    | StatusNotice
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Closed(ConnectionError):
    """The other side has closed the connection."""


# A message, or one with the vectors that follow it.
Sendable = Message | tuple[Replies | TokenReply, Sequence[Any]]


def _framed(messages: Sequence[Sendable]) -> list[memoryview]:
    views = []
    for item in messages:
        message, vectors = item if isinstance(item, tuple) else (item, ())
        body = _encoder.encode(message)
        payload = [memoryview(one).cast("B") for one in vectors if one.size]
        size = sum([view.nbytes for view in payload])
        views += [memoryview(_SIZES.pack(len(body), size) + body), *payload]
    return views


class Channel:
    """One connected socket. One thread at a time sends, and one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._received = memoryview(bytearray(BUFFER_BYTES))
        self._first = self._last = 0

    def send(self, *messages: Sendable) -> None:
        """Send messages, all of them in one system call if the socket has room. Raises Closed."""
        self.send_rest(_framed(messages))

    def try_send(self, *messages: Sendable) -> list[memoryview]:
        """Send as much as the socket has room for, and return the rest for `send_rest`. Raises Closed.

        The caller must send nothing else before the rest.
        """
        views = _framed(messages)
        while views and self._send(views):
            pass
        return views

    def send_rest(self, views: list[memoryview]) -> None:
        """Send what `try_send` returned, however long it takes. Raises Closed."""
        while views:
            if not self._send(views):
                self._wait_writable()

    def receive(self) -> tuple[Message, bytearray]:
        """The next message and its payload. Raises Closed."""
        body_size, payload_size = _SIZES.unpack(self._exactly(_SIZES.size))
        message = _decoder.decode(self._exactly(body_size))
        return message, self._exactly(payload_size)

    def receive_all(self) -> list[Message]:
        """The next message, and any without a payload that arrived with it. Raises Closed."""
        messages = [self.receive()[0]]
        while (size := self._next_size()) is not None:
            first = self._first + _SIZES.size
            self._first = first + size
            messages.append(_decoder.decode(self._received[first : self._first]))
        return messages

    def _next_size(self) -> int | None:
        """The size of the next message, if it has fully arrived."""
        here = self._last - self._first - _SIZES.size
        if here < 0:
            return None
        body_size, payload_size = _SIZES.unpack_from(self._received, self._first)
        return body_size if body_size <= here and not payload_size else None

    def close(self) -> None:
        """Close, and wake the thread that receives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, views: list[memoryview]) -> bool:
        """Send as much as the socket has room for and drop it from the list; False if it is full."""
        try:
            sent = self._socket.sendmsg(views[:512], (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Closed(str(error)) from None
        while views and sent >= views[0].nbytes:
            sent -= views.pop(0).nbytes
        if sent:
            views[0] = views[0][sent:]
        return True

    def _wait_writable(self) -> None:
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLOUT)
        except ValueError:
            raise Closed("this side closed the connection") from None
        poll.poll()

    def _exactly(self, size: int) -> bytearray:
        """The next bytes; small messages that arrive together cost a single system call."""
        result = bytearray(size)
        view = memoryview(result)
        while view:
            if self._first == self._last:
                if len(view) >= BUFFER_BYTES:
                    view = view[self._receive_into(view) :]
                    continue
                self._first, self._last = 0, self._receive_into(self._received)
            taken = min(len(view), self._last - self._first)
            view[:taken] = self._received[self._first : self._first + taken]
            self._first += taken
            view = view[taken:]
        return result

    def _receive_into(self, view: memoryview) -> int:
        try:
            received = self._socket.recv_into(view)
        except OSError as error:
            raise Closed(str(error)) from None
        if not received:
            raise Closed("the other side closed the connection")
        return received
