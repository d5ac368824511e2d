"""The four messages between web workers and a model process, and their framing on a unix socket.

A frame is two little-endian uint32, the sizes of what follows: raw float32 vectors (empty but for Replies),
and a msgpack message, which has the shapes of the vectors in their order. Nothing is ever pickled.
"""

import contextlib
import select
import socket
import struct
from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np

from embedding_service.engine import Answer, AnyRequest, Outcome, Status, Vectors
from embedding_service.errors import BY_NAME, ServiceError

_SIZES = struct.Struct("<II")

BUFFER_BYTES = 1 << 16


class Calls(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Web to model: requests that arrived together, each with the number that comes back with its answer."""

    numbers: list[int]
    requests: list[AnyRequest]


class Replies(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Model to web: answers that finished together, followed by their vectors."""

    numbers: list[int]
    answers: list[Answer]


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


Message = Calls | Replies | ErrorReply | StatusNotice


class Closed(ConnectionError):
    """The other side has closed the connection."""


def replies(outcomes: Sequence[tuple[int, Outcome]]) -> list[Message]:
    """The messages that carry outcomes which finished together."""
    messages: list[Message] = [
        ErrorReply.of(number, outcome) for number, outcome in outcomes if isinstance(outcome, ServiceError)
    ]
    answers = [(number, outcome) for number, outcome in outcomes if not isinstance(outcome, ServiceError)]
    if answers:
        numbers, found = zip(*answers, strict=True)
        messages.append(Replies(list(numbers), list(found)))
    return messages


class Channel:
    """One connected socket. One thread at a time sends, and one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._received = memoryview(bytearray(BUFFER_BYTES))
        self._first = self._last = 0
        # The vectors of the message that is being encoded, and the frame of the one that is being decoded.
        self._outgoing: list[Vectors] = []
        self._frame = bytearray()
        self._offset = 0
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._set_aside)
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
            Message, dec_hook=self._take_vectors
        )

    def send(self, *messages: Message, wait: bool = True) -> list[memoryview]:
        """Send messages, all of them in one system call if the socket has room. Raises Closed.

        Without `wait`, the rest for which it has no room is returned: `send_rest` must send it before
        anything else.
        """
        return self.send_rest(self._framed(messages), wait=wait)

    def send_rest(self, views: list[memoryview], *, wait: bool = True) -> list[memoryview]:
        """Send parts of messages, however long it takes, or without `wait` until the socket is full."""
        while views:
            try:
                sent = self._socket.sendmsg(views[:512], (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not wait:
                    break
                self._wait_writable()
                continue
            except OSError as error:
                raise Closed(str(error)) from None
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if sent:
                views[0] = views[0][sent:]
        return views

    def receive(self) -> Message:
        """The next message; its vectors are views of what was received. Raises Closed."""
        payload_size, size = _SIZES.unpack(self._exactly(_SIZES.size))
        self._frame, self._offset = self._exactly(payload_size + size), 0
        return self._decoder.decode(memoryview(self._frame)[payload_size:])

    def receive_all(self) -> list[Message]:
        """The next message, and those that have arrived whole with it. Raises Closed."""
        messages = [self.receive()]
        while (here := self._last - self._first - _SIZES.size) >= 0:
            if sum(_SIZES.unpack_from(self._received, self._first)) > here:
                break
            messages.append(self.receive())
        return messages

    def close(self) -> None:
        """Close, and wake the thread that receives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _framed(self, messages: Sequence[Message]) -> list[memoryview]:
        views = []
        for message in messages:
            self._outgoing = []
            body = self._encoder.encode(message)
            # Of many requests, which are small, a copy costs less than a view of each.
            found = [vectors.data for vectors in self._outgoing if vectors.size]
            payload = found[0].cast("B") if len(found) == 1 else memoryview(b"".join(found))
            head = _SIZES.pack(payload.nbytes, len(body))
            views += [memoryview(head), payload, memoryview(body)] if found else [memoryview(head + body)]
        return views

    def _set_aside(self, vectors: Vectors) -> tuple[int, ...]:
        self._outgoing.append(vectors)
        return vectors.shape

    def _take_vectors(self, _kind: type, shape: list[int]) -> Vectors:
        vectors = np.ndarray(shape, np.float32, self._frame, self._offset)
        self._offset += vectors.nbytes
        return vectors

    def _wait_writable(self) -> None:
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLOUT)
        except ValueError:
            raise Closed("this side closed the connection") from None
        poll.poll()

    def _exactly(self, size: int) -> bytearray:
        """The next bytes; small messages that arrive together cost a single system call."""
        first, last = self._first, self._first + size
        if last <= self._last:
            self._first = last
            return bytearray(self._received[first:last])
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
