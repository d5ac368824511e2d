"""Messages arrive unchanged, however the bytes are split, and a batch is sent in one call."""

import random
import socket
import threading

import numpy as np
import pytest
from msgspec.structs import replace

from embedding_service.engine import (
    Chunk,
    Embeddings,
    EmbedRequest,
    Status,
    TextError,
    Timings,
    TokenizedText,
    TokenLists,
    TokenVectors,
)
from embedding_service.errors import InvalidRequest, Overloaded
from embedding_service.sharing import wire
from embedding_service.sharing.server import Connection


@pytest.fixture
def ends():
    sockets = socket.socketpair(socket.AF_UNIX)
    yield sockets
    for one in sockets:
        one.close()


def calls(first: int, *texts: list[str]) -> wire.Calls:
    requests = [EmbedRequest(texts=own, deadline=1.5, prompt_name="query") for own in texts]
    return wire.Calls(list(range(first, first + len(texts))), [*requests])


def result(seed: int, texts: int, dimension: int, cache_hits: int | None = None) -> Embeddings:
    vectors = np.random.default_rng(seed).standard_normal((texts, dimension)).astype(np.float32)
    timings = Timings(tokenization_ms=1.0, queue_ms=2.0, inference_ms=float(seed))
    return Embeddings(
        vectors=vectors,
        tokens=seed,
        truncated=[seed],
        timings=timings,
        cache_hits=cache_hits,
        chunks=[[Chunk(0, 3, 1)]] * texts,
        errors=[TextError(1, "validation", "is bad")],
    )


@pytest.mark.parametrize("seed", range(10))
def test_calls_arrive_unchanged_however_the_bytes_are_split(ends, seed):
    chance = random.Random(seed)
    sent = [
        calls(n, *[["é" * chance.choice([0, 3, 200, 70_000])] * chance.randint(1, 3) for _ in range(2)])
        for n in range(40)
    ]
    raw = b"".join(wire.Channel(ends[0])._framed(sent))

    def write() -> None:
        first = 0
        while first < len(raw):
            last = first + chance.choice([1, 7, 100, 5000, 65_536, 300_000])
            ends[0].sendall(raw[first:last])
            first = last

    writer = threading.Thread(target=write)
    writer.start()
    channel, received = wire.Channel(ends[1]), []
    while len(received) < len(sent):
        received += channel.receive_all()
    writer.join()
    assert received == sent


def test_calls_that_arrive_together_are_received_together(ends):
    sent = [calls(n, ["text"]) for n in range(20)]
    wire.Channel(ends[0]).send(*sent)
    assert wire.Channel(ends[1]).receive_all() == sent


def test_answers_arrive_with_their_own_vectors(ends):
    sent = [result(1, 1, 384), result(2, 3, 5, cache_hits=2), result(3, 64, 384)]
    listed = TokenLists([TokenizedText([101], [0], [1], {0: "[CLS]"})])
    vectors = TokenVectors(vectors=np.ones((3, 2), np.float32), counts=[1, 2])
    notice = wire.StatusNotice(Status(state="loading"))
    wire.Channel(ends[0]).send(wire.Replies([4, 5, 6, 7, 8], [*sent, listed, vectors]), notice)
    message, other = wire.Channel(ends[1]).receive_all()
    assert isinstance(message, wire.Replies)
    assert message.numbers == [4, 5, 6, 7, 8]
    *got, got_lists, got_vectors = message.answers
    for one, expected in zip(got, sent, strict=True):
        assert np.array_equal(one.vectors, expected.vectors)
        assert replace(one, vectors=None) == replace(expected, vectors=None)
    assert got_lists == listed
    assert np.array_equal(got_vectors.vectors, vectors.vectors) and got_vectors.counts == [1, 2]
    assert other == notice


def test_all_outcomes_of_a_batch_are_sent_in_one_system_call():
    class Counted:
        """The part of a socket that sending needs."""

        def __init__(self) -> None:
            self.sent: list[bytes] = []

        def sendmsg(self, views, *_others) -> int:
            self.sent.append(b"".join(views))
            return len(self.sent[-1])

        def recv_into(self, _view) -> int:
            open_end.wait()
            return 0

        def shutdown(self, _how) -> None:
            pass

        def close(self) -> None:
            pass

    class Server:
        class engine:
            cancel = staticmethod(lambda _receiver: None)

        forget = staticmethod(lambda _connection: None)

    open_end = threading.Event()
    sock = Counted()
    connection = Connection(sock, Server)
    connection._answer([(n, result(n, 2, 8)) for n in range(30)] + [(30, Overloaded("full"))])
    open_end.set()
    assert len(sock.sent) == 1


@pytest.mark.parametrize(
    "error", [InvalidRequest("is bad", index=3), Overloaded("full", retry_after_seconds=2)]
)
def test_errors_arrive_unchanged(ends, error):
    wire.Channel(ends[0]).send(wire.ErrorReply.of(7, error))
    message = wire.Channel(ends[1]).receive()
    got = message.error()
    assert type(got) is type(error)
    assert vars(got) == vars(error)
