"""At which end over-long texts are truncated, and the list of a text's tokens."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embedding_service.errors import InvalidRequest
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
