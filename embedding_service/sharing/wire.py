"""The messages between web workers and a model process, and their framing on a unix socket.

A frame is two little-endian uint32, the sizes of what follows: a msgpack message, then raw float32
vectors (empty but for Reply). Nothing is ever pickled.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from embedding_service.engine import EmbedRequest, Status, Timings, TokenizedText, TokenizeRequest

_SIZES = struct.Struct("<II")


class Call(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Web to model: embed this; `number` comes back with the answer."""

    number: int
    request: EmbedRequest


class Reply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: the vectors follow, of shape (texts, dimension)."""

    number: int
    texts: int
    dimension: int
    tokens: int
    truncated: list[int]
    timings: Timings


class Tokenize(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Web to model: list the tokens of this."""

    number: int
    request: TokenizeRequest


class Tokenized(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: the tokens asked for."""

    number: int
    texts: list[TokenizedText]


class Failure(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: a ServiceError, by the name of its class."""

    number: int
    error: str
    message: str
    retry_after_seconds: float | None


class StatusNotice(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: sent on connecting and at every change."""

    status: Status


Message = Call | Reply | Tokenize | Tokenized | Failure | StatusNotice

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Closed(ConnectionError):
    """The other side has gone."""


class Channel:
    """One connected socket. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    def send(self, *messages: Message | tuple[Message, Any]) -> None:
        """Send messages, a Reply with its vectors as a pair; one system call for all of them.

        Raises Closed.
        """
        parts: list[Any] = []
        for item in messages:
            message, vectors = item if isinstance(item, tuple) else (item, b"")
            body = _encoder.encode(message)
            payload = memoryview(vectors).cast("B")
            parts += [_SIZES.pack(len(body), payload.nbytes), body, payload]
        with self._sending:
            try:
                self._send_all(parts)
            except OSError as error:
                raise Closed(str(error)) from None

    def receive(self) -> tuple[Message, bytearray]:
        """The next message and its payload. Raises Closed."""
        body_size, payload_size = _SIZES.unpack(self._exactly(_SIZES.size))
        message = _decoder.decode(self._exactly(body_size))
        return message, self._exactly(payload_size)

    def close(self) -> None:
        """Close, and wake the thread that receives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send_all(self, parts: Sequence[Any]) -> None:
        views = [memoryview(part) for part in parts if len(part)]
        while views:
            sent = self._socket.sendmsg(views[:512])
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if sent:
                views[0] = views[0][sent:]

    def _exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                received = self._socket.recv_into(view)
            except OSError as error:
                raise Closed(str(error)) from None
            if not received:
                raise Closed("the other side closed the connection")
            view = view[received:]
        return buffer
