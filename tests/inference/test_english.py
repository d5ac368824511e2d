"""Texts that need no normaliser get the same tokens without it."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from embedding_service.inference.preprocessing import RustTokenizer, TokenizerFacts
from tests.inference import tiny_models

LENGTH = 12
PRINTABLE = "".join(map(chr, range(32, 127)))
AWKWARD = ["É", "ﬁ", "東", "\u212a", "\t", "\x0b", "\x00", "\u200b", "[CLS]", "[cls]", "Fox-Trot", "DOG", " "]


@pytest.fixture(params=["lowercase", "cased"])
def own(request) -> Tokenizer:
    """A tokenizer as models bring it, with an added token besides the special ones."""
    backend = tiny_models.tokenizer(tiny_models.BERT, "[CLS] $A [SEP]").backend_tokenizer
    backend.normalizer = normalizers.BertNormalizer(lowercase=request.param == "lowercase")
    backend.add_tokens([AddedToken("fox-trot", normalized=True), AddedToken("DOG", normalized=False)])
    backend.enable_truncation(LENGTH)
    return backend


def rust(own: Tokenizer) -> RustTokenizer:
    facts = TokenizerFacts(
        serialized=own.to_str(),
        max_length=LENGTH,
        truncation_side="right",
        pad_id=0,
        pads_left=False,
        inputs=["input_ids"],
        prompt_left_out=False,
        special_ids=[0, 1, 2, 3],
    )
    return RustTokenizer(facts, threads=2)


def a_text(source: random.Random, awkward: float) -> str:
    parts = [
        source.choice(AWKWARD if source.random() < awkward else [*tiny_models.WORDS, *PRINTABLE, "The ", " "])
        for _ in range(source.randrange(20))
    ]
    return "".join(parts)


@pytest.mark.parametrize("awkward", [0, 0.02, 0.3])
@pytest.mark.parametrize("parallel", [False, True])
def test_tokens_are_those_of_the_whole_tokenizer(own, awkward, parallel):
    tokenizer, source = rust(own), random.Random(awkward)
    for count in (1, 2, 40, 400):
        texts = [a_text(source, awkward) for _ in range(count)]
        found = tokenizer.prepare(texts, parallel=parallel)
        expected = [encoding.ids for encoding in own.encode_batch(texts)]
        assert found.lengths.tolist() == [len(ids) for ids in expected]
        assert found.ids.tolist() == [number for ids in expected for number in ids]
        assert found.truncated.tolist() == [bool(one.overflowing) for one in own.encode_batch(texts)]
