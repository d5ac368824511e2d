"""At which end over-long texts are truncated, and the list of a text's tokens."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.errors import InvalidRequest
from embedding_service.inference.own_preprocessing import OwnPreprocessor
from tests.inference.running import embed, load, request

LONG = ["the quick brown fox of the river " * 20 + "end", "fox"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "left-padding", "prompts"])
def test_over_long_texts_are_truncated_at_the_requested_end(tiny, kind, side):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    model = load(tiny(kind), backend="torch")
    oracle.tokenizer.truncation_side = side
    (plain, cut) = embed(model, [request(LONG), request(LONG, truncation_side=side)])
    assert np.abs(cut.vectors - oracle.encode(LONG, normalize_embeddings=True)).max() < 1e-5
    assert cut.truncated == [0]
    assert np.allclose(cut.vectors, plain.vectors, atol=1e-5) == (side == "right")


def test_a_model_that_truncates_by_itself_rejects_the_other_end(tiny):
    with pytest.raises(InvalidRequest, match="cuts its texts itself"):
        load(tiny("static"), backend="torch").preprocessor.prepare(["fox"], None, None, "left")


@pytest.mark.parametrize("kind", ["bert", "roberta-cls", "left-padding", "static", "routed"])
def test_tokens_are_listed_with_their_characters(tiny, kind):
    model = load(tiny(kind), backend="torch")
    text = "The quick 東 fox"
    (listed,) = model.lister.list([text], True)
    named = [
        listed.special.get(position, text[start:stop])
        for position, (start, stop) in enumerate(zip(listed.starts, listed.stops, strict=True))
    ]
    assert [name for position, name in enumerate(named) if position not in listed.special] == [
        "The",
        "quick",
        "東",
        "fox",
    ]
    (bare,) = model.lister.list([text], False)
    assert bare.special == {}
    assert bare.ids == [number for at, number in enumerate(listed.ids) if at not in listed.special]


def test_tokens_of_a_long_text_are_all_listed(tiny):
    (listed,) = load(tiny("bert"), backend="torch").lister.list(["fox " * 1000], False)
    assert len(listed.ids) == 1000


def test_a_lone_surrogate_is_refused_with_its_index(tiny):
    with pytest.raises(InvalidRequest, match=r"texts\[1\]"):
        load(tiny("bert"), backend="torch").lister.list(["fine", "\ud800"], True)


def without_more_tokens(oracle: SentenceTransformer, ids: list[int]) -> np.ndarray:
    """The vector of token ids that are decoded, and tokenized again without special tokens."""
    inputs = oracle.tokenizer(oracle.tokenizer.decode(ids), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        return oracle(dict(inputs))["sentence_embedding"][0].numpy()


@pytest.mark.parametrize("kind", ["bert", "roberta-cls", "left-padding"])
def test_token_ids_are_read_without_further_tokens(tiny, kind):
    oracle = SentenceTransformer(str(tiny(kind)), device="cpu")
    model = load(tiny(kind), backend="torch")
    ids = oracle.tokenizer("the quick fox")["input_ids"]
    bare = [each for each in ids if each not in oracle.tokenizer.all_special_ids]
    (found,) = embed(model, [request(["a river", tuple(bare), tuple(ids), tuple(bare)])])
    expected = [oracle.encode("a river"), without_more_tokens(oracle, bare), oracle.encode("the quick fox")]
    vectors = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
    expected = np.array(expected) / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(vectors[:3] - expected).max() < 1e-5
    assert np.array_equal(found.vectors[1], found.vectors[3])
    assert model.lister.decode([ids], True) == model.lister.decode([bare], False)


def test_token_ids_of_a_static_model_are_read_like_their_text(tiny):
    model = load(tiny("static"), backend="torch")
    (listed,) = model.lister.list(["the quick fox"], False)
    (found,) = embed(model, [request(["the quick fox", tuple(listed.ids)])])
    assert np.array_equal(found.vectors[0], found.vectors[1])


@pytest.mark.parametrize(
    ("kind", "texts", "reason"),
    [
        ("bert", ["fox", (10**6,)], r"texts\[1\] holds the token id 1000000, which is not in the model's"),
        ("bert", ["fox", (1,), "\ud800"], r"texts\[2\] is not valid Unicode"),
    ],
    ids=["unknown", "surrogate"],
)
def test_token_ids_that_cannot_be_read_are_refused(tiny, kind, texts, reason):
    with pytest.raises(InvalidRequest, match=reason):
        load(tiny(kind), backend="torch").preprocessor.prepare(texts)


def test_a_model_that_tokenizes_by_itself_refuses_token_ids(tiny):
    own = OwnPreprocessor(SentenceTransformer(str(tiny("bert")), device="cpu"), 32)
    with pytest.raises(InvalidRequest, match=r"texts\[1\] is token ids, which this model cannot read"):
        own.prepare(["fox", (5, 6)])
