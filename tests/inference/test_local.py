"""The engine in this process lists tokens within the deadline, whatever the tokenizer does."""

from typing import Any, cast

import pytest

from embedding_service.engine import TokenizedText, TokenizeRequest
from embedding_service.errors import DeadlineExceeded, ModelFailure
from embedding_service.inference.local import LocalEngine
from embedding_service.inference.settings import ModelSettings


class Lister:
    """The part of a loaded model that listing tokens needs."""

    info = None
    max_batch_tokens = 1

    def list_tokens(self, texts, _add_special_tokens):
        if "broken" in texts:
            raise RuntimeError("a bug of the tokenizer")
        return [TokenizedText([len(text)], [0], [len(text)], {}) for text in texts]


@pytest.fixture
def engine():
    engine = LocalEngine(ModelSettings(embedding_model="none"), load=lambda _settings: cast(Any, Lister()))
    assert engine.loaded.wait(10)
    yield engine
    engine.close()


def test_many_texts_are_listed_in_their_order(engine):
    texts = ["x" * length for length in range(200)]
    listed = engine.tokenize(TokenizeRequest(texts=texts, deadline=float("inf")))
    assert [text.ids for text in listed] == [[length] for length in range(200)]


def test_listing_ends_at_the_deadline(engine):
    with pytest.raises(DeadlineExceeded):
        engine.tokenize(TokenizeRequest(texts=["x"], deadline=0.0))


def test_a_tokenizer_bug_fails_only_its_request(engine):
    with pytest.raises(ModelFailure):
        engine.tokenize(TokenizeRequest(texts=["broken"], deadline=float("inf")))
    assert len(engine.tokenize(TokenizeRequest(texts=["fine"], deadline=float("inf")))) == 1
