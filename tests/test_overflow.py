"""Texts that are too long for the model: truncated, rejected, or embedded in pieces."""

import itertools

import numpy as np
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedding_service.engine import Chunk
from embedding_service.errors import InvalidRequest
from embedding_service.inference.pending import means_of
from embedding_service.inference.preprocessing import without_limits
from embedding_service.inference.splitting import Splitter, end_of_piece, start_of_next
from tests.service import ROOT

SENTENCES = (ROOT / "benchmarks" / "sentences.txt").read_text().split("\n")
LONG = " ".join(SENTENCES[:200])
SHORT = "a short text"
# Ten words of three tokens each: 0-1-2 3-4-5 …, with a space after every third.
WORDS = [(4 * (i // 3) + i % 3, 4 * (i // 3) + i % 3 + 1) for i in range(30)]


@pytest.mark.parametrize(
    ("first", "room", "after", "last"),
    [(0, 8, 0, 6), (0, 9, 0, 9), (0, 30, 0, 30), (24, 9, 0, 30), (0, 2, 0, 2), (6, 8, 12, 14)],
    ids=["before a word", "fits", "all", "the rest", "within a word", "past the piece before"],
)
def test_a_piece_ends_before_a_word(first, room, after, last):
    assert end_of_piece(WORDS, first, room, after) == last


@pytest.mark.parametrize(
    ("first", "last", "overlap", "found"),
    [(0, 9, 0, 9), (0, 9, 4, 6), (0, 9, 2, 9), (0, 8, 1, 7), (0, 3, 9, 3)],
    ids=["no overlap", "at a word", "none that short", "within a word", "always later"],
)
def test_the_next_piece_starts_with_a_word(first, last, overlap, found):
    assert start_of_next(WORDS, first, last, overlap) == found


def plain(oracle) -> Tokenizer:
    """The model's tokenizer, which neither truncates nor pads."""
    return without_limits(oracle.tokenizer.backend_tokenizer)


@pytest.fixture(scope="module")
def splitter(oracle):
    return Splitter(plain(oracle), 256)


def tokens_of(oracle, text: str) -> int:
    return len(oracle.tokenizer(text, truncation=False)["input_ids"])


AWKWARD = {
    "sentences": LONG,
    "no space": "ab-cd.ef," * 300,
    "Chinese": "今天天气很好我们去公园" * 100,
    "emoji": "👩‍👩‍👧 family " * 300,
    "spaces": "a    b\n\n\nc\t" * 300,
    "outer spaces": "   " + "word " * 400 + "  ",
}


@pytest.mark.parametrize("overlap", [0, 20, 200])
@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_pieces_fit_cover_the_text_and_overlap_no_more_than_requested(oracle, splitter, text, overlap):
    [chunks] = splitter.split([text], None, overlap)
    assert len(chunks) > 1
    covered = set()
    for chunk in chunks:
        assert tokens_of(oracle, text[chunk.start : chunk.stop]) <= 256
        covered |= set(range(chunk.start, chunk.stop))
    assert not [i for i, character in enumerate(text) if not character.isspace() and i not in covered]
    for left, right in itertools.pairwise(chunks):
        assert left.start < right.start
        shared = text[right.start : left.stop] if right.start < left.stop else ""
        assert tokens_of(oracle, shared) - 2 <= overlap + 1
        if not overlap:
            assert right.start >= left.stop


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400), st.integers(0, 3))
def test_any_text_is_split(oracle, text, overlap):
    short = Splitter(plain(oracle), 12)
    [chunks] = short.split([text], None, overlap)
    assert chunks
    assert all(tokens_of(oracle, text[chunk.start : chunk.stop]) <= 12 for chunk in chunks)


def test_a_text_that_fits_is_one_piece(splitter):
    assert splitter.split(["", SHORT], None, 0) == [[Chunk(0, 0, 0)], [Chunk(0, len(SHORT), 3)]]


def test_each_piece_leaves_room_for_the_prompt(oracle, splitter):
    prompt = "represent this text for retrieval: "
    [chunks] = splitter.split([LONG], prompt, 0)
    assert max(tokens_of(oracle, prompt + LONG[chunk.start : chunk.stop]) for chunk in chunks) <= 256
    with pytest.raises(InvalidRequest, match=r"chunk_overlap must be below 254, the tokens of a piece"):
        splitter.split([LONG], None, 254)


def test_a_prompt_that_fills_the_window_is_named_in_the_error(splitter):
    with pytest.raises(
        InvalidRequest, match="the prompt leaves no room for a text in the 256 tokens"
    ) as info:
        splitter.split([LONG], "a long prompt " * 100, 0)
    assert info.value.field is None


def test_a_model_that_reads_everything_gets_whole_texts(oracle):
    assert [len(own) for own in Splitter(plain(oracle), None).split([LONG, SHORT], None, 0)] == [1, 1]


def test_the_mean_is_weighted_by_tokens_and_keeps_single_pieces_unchanged():
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    chunks = [[Chunk(0, 1, 3), Chunk(1, 2, 1)], [Chunk(0, 1, 7)]]
    assert np.array_equal(means_of(vectors, chunks, normalize=False)[0], np.float32([0.75, 0.25]))
    found = means_of(vectors, chunks, normalize=True)
    assert np.allclose(found[0], np.array([3, 1]) / np.sqrt(10))
    assert np.array_equal(found[1], vectors[2])


def ask(service, path="embed", **fields):
    return requests.post(f"{service.url}/{path}", json=fields, timeout=60)


@pytest.mark.parametrize("overlap", [0, 30])
def test_chunks_are_vectors_of_their_characters_alone(service, oracle, overlap):
    body = ask(service, texts=[SHORT, LONG], overflow="chunks", chunk_overlap=overlap).json()
    texts = [[SHORT, LONG][piece["text"]][piece["start"] : piece["end"]] for piece in body["chunks"]]
    assert [piece["text"] for piece in body["chunks"]] == [0] + [1] * (len(texts) - 1)
    assert body["count"] == body["usage"]["chunks"] == len(texts) > 5
    assert body["usage"]["truncated"] == []
    expected = oracle.encode(texts, normalize_embeddings=True)
    assert np.abs(np.array(body["embeddings"]) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("path", "field", "vectors"),
    [
        ("embed", "texts", lambda body: body["embeddings"]),
        ("v1/embeddings", "input", lambda body: [row["embedding"] for row in body["data"]]),
        ("embed", "inputs", lambda body: body),
        ("v2/embed", "texts", lambda body: body["embeddings"]["float"]),
    ],
    ids=["native", "OpenAI", "TEI", "Cohere"],
)
def test_mean_is_the_weighted_mean_of_the_pieces(service, oracle, path, field, vectors):
    [chunks] = Splitter(plain(oracle), 256).split([LONG], None, 0)
    pieces = oracle.encode([LONG[chunk.start : chunk.stop] for chunk in chunks], normalize_embeddings=True)
    expected = np.average(pieces, axis=0, weights=[chunk.tokens for chunk in chunks])
    expected /= np.linalg.norm(expected)
    found = vectors(ask(service, path, **{field: [SHORT, LONG]}, overflow="mean").json())
    assert np.abs(np.array(found[1]) - expected).max() < 1e-5
    assert np.abs(np.array(found[0]) - oracle.encode(SHORT, normalize_embeddings=True)).max() < 1e-5


def test_mean_counts_its_pieces_and_keeps_dimensions(service):
    body = ask(service, texts=[SHORT, LONG], overflow="mean", dimensions=64).json()
    assert (body["count"], body["dimension"]) == (2, 64)
    assert body["usage"]["chunks"] > 5
    assert body["usage"]["tokens"] > 1500
    assert abs(np.linalg.norm(body["embeddings"][1]) - 1) < 1e-5


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"overflow": "error"}, "texts", "has more than 256 tokens"),
        ({"overflow": "mean", "truncate": True}, "truncate", "contradicts overflow"),
        ({"overflow": "error", "truncate": True}, "truncate", "contradicts overflow"),
        ({"overflow": "chunks", "truncate": True}, "truncate", "contradicts overflow"),
        ({"overflow": "truncate", "truncate": False}, "truncate", "contradicts overflow"),
        ({"overflow": "mean", "chunk_overlap": 254}, "chunk_overlap", "must be below 254"),
        ({"overflow": "mean", "chunk_overlap": -1}, "chunk_overlap", "must be a whole number from 0"),
        ({"overflow": "window"}, "overflow", 'must be "chunks", "error", "mean" or "truncate"'),
    ],
    ids=str,
)
def test_an_error_names_the_field(service, fields, field, reason):
    response = ask(service, texts=[SHORT, LONG], **fields)
    body = response.json()
    assert (response.status_code, body["field"]) == (400, field)
    assert body["reason"].startswith(reason) or reason in body["reason"]


def test_too_many_pieces_are_rejected(start):
    service = start(MAX_TEXTS_PER_REQUEST="5", DEFAULT_OVERFLOW="mean").wait_ready()
    response = ask(service, texts=[LONG])
    assert response.status_code == 413
    assert response.json()["reason"].endswith(
        "pieces of the length that the model reads; at most 5 are allowed"
    )
    # The default is now mean, unless a request says otherwise.
    assert ask(service, texts=[LONG[:2000]]).json()["usage"]["chunks"] == 2
    assert ask(service, texts=[LONG], overflow="truncate").json()["usage"] == {
        "tokens": 256,
        "truncated": [0],
    }
    assert ask(service, texts=[LONG], truncate=False).status_code == 400


def test_a_bad_text_does_not_fail_the_others(service, oracle):
    texts = ["good", LONG, "fine", LONG + "!", "x" * 100_001, *["more"] * 3, LONG, "last"]
    body = ask(service, texts=texts, overflow="error", on_error="null").json()
    bad = [1, 3, 4, 8]
    assert [error["index"] for error in body["errors"]] == bad
    kinds = ["validation", "validation", "too_large", "validation"]
    assert [error["error_type"] for error in body["errors"]] == kinds
    assert body["errors"][0]["reason"].startswith("has more than 256 tokens")
    assert [index for index, one in enumerate(body["embeddings"]) if one is None] == bad
    good = [index for index in range(len(texts)) if index not in bad]
    expected = oracle.encode([texts[index] for index in good], normalize_embeddings=True)
    assert np.abs(np.array([body["embeddings"][index] for index in good]) - expected).max() < 1e-5
    assert body["count"] == len(texts)


def test_chunks_of_the_good_texts(service, oracle):
    texts = ["good", "x" * 100_001, LONG]
    body = ask(service, texts=texts, overflow="chunks", on_error="null").json()
    assert [error["index"] for error in body["errors"]] == [1]
    owners = [piece["text"] for piece in body["chunks"]]
    assert owners == [0] + [2] * (len(owners) - 1)
    pieces = [texts[piece["text"]][piece["start"] : piece["end"]] for piece in body["chunks"]]
    assert body["count"] == body["usage"]["chunks"] == len(pieces) > 5
    expected = oracle.encode(pieces, normalize_embeddings=True)
    assert np.abs(np.array(body["embeddings"]) - expected).max() < 1e-5


def test_without_a_bad_text_the_list_of_errors_is_empty(service):
    body = ask(service, texts=["good", "fine"], on_error="null").json()
    assert body["errors"] == []
    assert None not in body["embeddings"]


def test_if_every_text_is_bad_every_vector_is_null(service):
    body = ask(service, texts=[LONG] * 3, overflow="error", on_error="null").json()
    assert (body["embeddings"], len(body["errors"])) == ([None] * 3, 3)


def test_an_error_that_is_not_about_a_text_still_fails(service):
    assert ask(service, texts=["a"], prompt_name="nope", on_error="null").status_code == 400
    assert ask(service, texts=[], on_error="null").status_code == 400


@pytest.mark.parametrize("precision", ["float16", "binary"])
def test_bad_texts_have_no_numbers_in_any_precision(service, precision):
    body = ask(service, texts=["good", LONG], overflow="error", on_error="null", precision=precision).json()
    assert body["embeddings"][1] is None
    assert body["embeddings"][0] is not None
