"""The engine in this process lists tokens within the deadline, whatever the tokenizer does."""

import threading

import pytest

from embedding_service.engine import ListTokensRequest, TokenizedText
from embedding_service.errors import DeadlineExceeded, ModelFailure, Unavailable
from embedding_service.inference.local import LocalEngine
from embedding_service.inference.model import Model
from embedding_service.settings.config import Config
from tests.inference.fake_runtime import FakeRuntime, request, text


class Lister:
    """The part of a loaded model that listing tokens needs."""

    def list(self, texts, _add_special_tokens):
        if "broken" in texts:
            raise RuntimeError("a bug of the tokenizer")
        return [TokenizedText([len(text)], [0], [len(text)], {}) for text in texts]


def model_with(lister) -> Model:
    model = FakeRuntime()
    model.__dict__["lister"] = lister
    return model


@pytest.fixture
def engine():
    engine = LocalEngine(Config(embedding_model="none"), load=lambda _settings: model_with(Lister()))
    assert engine.loaded.wait(60)
    yield engine
    engine.close()


def test_many_texts_are_listed_in_their_order(engine):
    texts = ["x" * length for length in range(200)]
    listed = engine.call(ListTokensRequest(texts=texts, deadline=float("inf"))).texts
    assert [text.ids for text in listed] == [[length] for length in range(200)]


def test_listing_ends_at_the_deadline(engine):
    with pytest.raises(DeadlineExceeded):
        engine.call(ListTokensRequest(texts=["x"], deadline=0.0))


def test_a_tokenizer_bug_fails_only_its_request(engine):
    with pytest.raises(ModelFailure):
        engine.call(ListTokensRequest(texts=["broken"], deadline=float("inf")))
    assert len(engine.call(ListTokensRequest(texts=["fine"], deadline=float("inf"))).texts) == 1


def test_an_engine_that_is_closed_while_it_loads_stays_closed():
    may_load = threading.Event()

    def load(_settings):
        assert may_load.wait(60)
        return FakeRuntime()

    states = []
    engine = LocalEngine(
        Config(embedding_model="none"), load=load, on_status=lambda status: states.append(status.state)
    )
    engine.close()
    may_load.set()
    assert engine.loaded.wait(60)
    assert set(states) == {"draining"}
    with pytest.raises(Unavailable):
        engine.call(request([text(5)]))
