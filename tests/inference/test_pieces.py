"""Texts in pieces, and bad texts that are left out, on a runtime whose faults the tests decide."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from embedding_service.engine import Chunk, Embeddings
from embedding_service.errors import DeadlineExceeded, InvalidRequest, ModelFailure, TooLarge, Unavailable
from embedding_service.inference.batcher import Batcher
from embedding_service.inference.pending import normalize
from embedding_service.observability import metrics
from tests.inference.fake_runtime import Answer, FakeRuntime, request, submit, text, vector_of
from tests.service import wait_until


class Splitter:
    """Cuts at each bar; `on_split` sees the texts first."""

    def __init__(self, on_split=lambda _texts: None) -> None:
        self.on_split = on_split

    def split(self, texts, prompt, overlap) -> list[list[Chunk]]:
        self.on_split(texts)
        return [chunks_of(one) for one in texts]


def chunks_of(one: str) -> list[Chunk]:
    chunks, start = [], 0
    for piece in one.split("|"):
        chunks.append(Chunk(start, start + len(piece), int(piece.split(" ")[0]) if piece else 0))
        start += len(piece) + 1
    return chunks


def cutting(runtime: FakeRuntime, splitter: Splitter | None = None) -> FakeRuntime:
    """The runtime, which can cut texts."""
    runtime.__dict__["splitter"] = splitter or Splitter()
    return runtime


def pieces_of(one: str) -> list[str]:
    return one.split("|")


def failing_on(word: str):
    def check(batch) -> None:
        if any(word in one.text for one in batch):
            raise RuntimeError("injected")

    return check


def expect_rows(outcome, rows: list[str | None]) -> None:
    """Each row is the vector of this text, or no number."""
    assert isinstance(outcome, Embeddings), outcome
    assert len(outcome.vectors) == len(rows)
    for vector, one in zip(outcome.vectors, rows, strict=True):
        if one is None:
            assert np.isnan(vector).all()
        else:
            assert np.allclose(vector, normalize(vector_of(one)[None])[0], atol=1e-6)


# Pieces

LONG = "5 a|7 b|3 c"


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20], ids=["no cache", "cache"])
def test_every_piece_has_its_vector_and_its_text_the_mean(build, cache_bytes):
    batcher = build(cutting(FakeRuntime()), cache_bytes=cache_bytes)
    texts = [text(4, "short"), LONG, "5 a|5 a"]
    for _ in range(2):
        outcome = submit(batcher, texts, overflow="chunks").wait()
        expect_rows(outcome, [piece for one in texts for piece in pieces_of(one)])
        assert outcome.chunks == [chunks_of(one) for one in texts]
        assert outcome.tokens == 4 + 15 + 10
        mean = submit(batcher, texts, overflow="mean").wait()
        expected = np.average(
            normalize(np.stack([vector_of(piece) for piece in pieces_of(LONG)])), axis=0, weights=[5, 7, 3]
        )
        assert np.allclose(mean.vectors[1], expected / np.linalg.norm(expected), atol=1e-6)
        assert np.allclose(mean.vectors[2], outcome.vectors[4], atol=1e-6)
        assert mean.cache_hits == (None if not cache_bytes else 6)
    assert batcher.queued_tokens == 0


def test_hundreds_of_texts_are_cut_in_their_order(build):
    batcher = build(cutting(FakeRuntime()))
    texts = ["|".join(text(n % 9 + 3, f"{n} {piece}") for piece in range(n % 4 + 1)) for n in range(300)]
    outcome = submit(batcher, texts, overflow="chunks").wait()
    expect_rows(outcome, [piece for one in texts for piece in pieces_of(one)])
    assert [len(own) for own in outcome.chunks] == [n % 4 + 1 for n in range(300)]


def test_a_truncated_piece_is_reported_as_its_text(build):
    batcher = build(cutting(FakeRuntime(max_seq_length=6)))
    outcome = submit(batcher, [text(3), "5 a|7 b", "7 b|7 c"], overflow="mean").wait()
    assert outcome.truncated == [1, 2]


def test_too_many_pieces_are_refused(build):
    batcher = build(cutting(FakeRuntime()))
    assert isinstance(submit(batcher, [LONG], overflow="mean", max_chunks=3).wait(), Embeddings)
    refused = submit(batcher, [LONG, text(5)], overflow="mean", max_chunks=3).wait()
    assert isinstance(refused, TooLarge)
    assert "make 4 pieces" in refused.message
    assert batcher.queued_tokens == 0


def held_while_cutting(build) -> tuple[Batcher, Answer, threading.Event]:
    """A batcher, a request whose text takes forever to cut, and what ends that."""
    hung, release = threading.Event(), threading.Event()

    def slow(texts) -> None:
        if "slow" in texts[0]:
            hung.set()
            assert release.wait(60)

    batcher = build(cutting(FakeRuntime(), Splitter(slow)))
    answer = submit(batcher, ["5 slow|6 slow"], overflow="mean")
    assert hung.wait(60)
    return batcher, answer, release


def test_one_long_cut_delays_nobody_who_needs_none(build):
    batcher, slow, release = held_while_cutting(build)
    expect_rows(submit(batcher, [text(5, "single")]).wait(), [text(5, "single")])
    many = [text(5, number) for number in range(300)]
    expect_rows(submit(batcher, many).wait(), many)
    assert not slow.done
    release.set()
    assert isinstance(slow.wait(), Embeddings)


def test_a_request_that_is_being_cut_ends_with_its_receiver_and_with_the_batcher(build):
    batcher, gone, release = held_while_cutting(build)
    waiting = submit(batcher, [LONG], overflow="mean")
    batcher.cancel(gone)
    batcher.close("over")
    assert isinstance(waiting.wait(), Unavailable)
    release.set()
    assert isinstance(submit(batcher, [LONG], overflow="mean").wait(), Unavailable)
    assert not gone.done


def test_a_request_whose_deadline_passed_is_not_cut(build):
    batcher, _, release = held_while_cutting(build)
    late = submit(batcher, [LONG], overflow="mean", seconds=0.5)
    past = time.monotonic() + 0.5
    wait_until(lambda: time.monotonic() > past)
    release.set()
    assert isinstance(late.wait(), DeadlineExceeded)


def test_a_fault_of_the_splitter_fails_its_request_alone(build):
    def broken(texts) -> None:
        if "broken" in texts[0]:
            raise KeyError("injected")

    batcher = build(cutting(FakeRuntime(), Splitter(broken)))
    assert isinstance(submit(batcher, ["5 broken"], overflow="mean").wait(), ModelFailure)
    assert isinstance(submit(batcher, [LONG], overflow="mean").wait(), Embeddings)


def test_an_error_names_the_text_and_not_the_piece(build):
    def refuse(texts) -> None:
        if any("not unicode" in one for one in texts):
            raise InvalidRequest("is bad", index=[("not unicode" in one) for one in texts].index(True))

    runtime = FakeRuntime(on_forward=failing_on("poison"))
    batcher = build(cutting(runtime, Splitter(refuse)))
    assert submit(batcher, [LONG, text(5), "5 a|5 poison"], overflow="mean").wait().index == 2
    assert submit(batcher, [LONG, "5 not unicode"], overflow="chunks").wait().index == 1


# Bad texts


@pytest.mark.parametrize("count", [1, 300], ids=["small", "large"])
@pytest.mark.parametrize(
    ("bad", "error_type"),
    [("5 poison", "internal"), ("5 nan", "internal"), ("5 \0", "validation"), ("99 long", "validation")],
    ids=["fails", "not finite", "no Unicode", "too long"],
)
def test_a_bad_text_is_left_out_and_the_others_are_computed_once(build, bad, error_type, count):
    def spoil(batch) -> np.ndarray | None:
        failing_on("poison")(batch)
        vectors = np.stack([vector_of(one.text) for one in batch])
        vectors[[i for i, one in enumerate(batch) if "nan" in one.text]] = np.nan
        return vectors

    runtime = FakeRuntime(max_seq_length=50, on_forward=spoil)
    runtime.exact = SimpleNamespace(forward=lambda _one: np.full((1, 8), np.nan, np.float32))
    batcher = build(runtime)
    good = [text(5, number) for number in range(count)]
    failed = metrics.FAILED_TEXTS._value.get()
    outcome = submit(batcher, [*good, bad, text(7), bad], overflow="error", on_error="null").wait()
    expect_rows(outcome, [*good, None, text(7), None])
    assert [(error.index, error.error_type) for error in outcome.errors] == [
        (count, error_type),
        (count + 2, error_type),
    ]
    assert (outcome.tokens, outcome.truncated) == (5 * count + 7, [])
    assert metrics.FAILED_TEXTS._value.get() - failed == 2
    assert batcher.queued_tokens == 0


def test_a_text_that_is_no_text_is_named_wherever_it_is(build):
    batcher = build(cutting(FakeRuntime()))
    texts = [text(5, number) for number in range(300)]
    assert submit(batcher, [*texts, texts[0], "5 \0"]).wait().index == 301
    assert submit(batcher, [texts[0], texts[0], "5 \0"]).wait().index == 2
    assert submit(batcher, ["5 a|6 b", "5 a|5 \0"], overflow="mean").wait().index == 1


def test_a_text_with_too_many_characters_is_left_out(build):
    batcher = build(FakeRuntime())
    outcome = submit(
        batcher, ["5 " + "x" * 50, text(5)], on_error="null", max_characters=20, normalize=True
    ).wait()
    expect_rows(outcome, [None, text(5)])
    assert [(error.index, error.error_type) for error in outcome.errors] == [(0, "too_large")]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20], ids=["no cache", "cache"])
def test_if_every_text_is_bad_every_row_is(build, cache_bytes):
    batcher = build(FakeRuntime(max_seq_length=50), cache_bytes=cache_bytes)
    submit(batcher, ["99 long"]).wait()
    for texts in (["99 long"] * 3, [text(60, number) for number in range(300)]):
        outcome = submit(batcher, texts, overflow="error", on_error="null").wait()
        expect_rows(outcome, [None] * len(texts))
        assert len(outcome.errors) == len(texts)
    assert batcher.queued_tokens == 0


def test_a_text_with_a_bad_piece_has_no_pieces_and_the_others_have(build):
    batcher = build(cutting(FakeRuntime(max_seq_length=50, on_forward=failing_on("poison"))))
    texts = [text(3), "5 a|5 poison", "4 b|60 c", "5 poison"]
    outcome = submit(batcher, texts, overflow="chunks", on_error="null").wait()
    expect_rows(outcome, [text(3), "4 b", "60 c"])
    assert [len(own) for own in outcome.chunks] == [1, 0, 2, 0]
    assert [error.index for error in outcome.errors] == [1, 3]
    assert (outcome.truncated, outcome.tokens) == ([2], 3 + 4 + 50)
    means = submit(batcher, texts, overflow="mean", on_error="null", dimensions=3).wait()
    assert means.vectors.shape == (4, 3)
    assert np.isnan(means.vectors).all(axis=1).tolist() == [False, True, False, True]


def test_texts_and_the_caller_s_list_stay_as_they_are(build):
    texts = ["5 \0", text(5)]
    answer = Answer()
    build(FakeRuntime()).submit([(0, request(texts, on_error="null"))], answer)
    assert isinstance(answer.wait(), Embeddings)
    assert texts == ["5 \0", text(5)]
