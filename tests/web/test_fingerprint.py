"""Every answer with vectors names their model's fingerprint, and a request can insist on one."""

import msgspec
import pytest

from embedding_service.engine import Status
from tests.fakes import BODIES, INFO

# Those whose answers have vectors.
ROUTES = {path: body for path, body in BODIES.items() if not path.endswith(("tokenize", "/decode"))}
EXPECT = "x-expect-fingerprint"


@pytest.mark.parametrize("path", ROUTES)
def test_every_answer_with_vectors_has_it(client, path):
    answer = client.post(path, json=ROUTES[path], headers={EXPECT: INFO.fingerprint})
    assert (answer.status_code, answer.headers["x-model-fingerprint"]) == (200, INFO.fingerprint)


@pytest.mark.parametrize("path", ROUTES)
def test_another_one_than_expected_is_refused_before_anything_is_computed(client, engine, path):
    engine.error = AssertionError("computed")
    answer = client.post(path, json=ROUTES[path], headers={EXPECT: "another"})
    assert answer.status_code == 412
    error = answer.json.get("error", answer.json.get("message"))
    text = error["message"] if isinstance(error, dict) else error
    assert "'another'" in text and INFO.fingerprint in text
    assert engine.requests == []


def test_the_type_of_the_error_is_a_word_of_its_own(client):
    native, openai = (
        client.post(path, json=ROUTES[path], headers={EXPECT: "another"}).json
        for path in ("/embed", "/v1/embeddings")
    )
    assert native["error_type"] == openai["error"]["code"] == "fingerprint_mismatch"


def test_numpy_arrays_have_it_too(client):
    answer = client.post("/embed", json={"texts": "x"}, headers={"Accept": "application/x-npy"})
    assert answer.headers["x-model-fingerprint"] == INFO.fingerprint


def test_a_model_that_is_replaced_during_the_request_is_noticed(client, engine, monkeypatch):
    other = Status(state="healthy", info=msgspec.structs.replace(INFO, fingerprint="new"))
    embed = engine.embed

    def replaced(request):
        engine.current = other
        return embed(request)

    monkeypatch.setattr(engine, "embed", replaced)
    answer = client.post("/embed", json={"texts": "x"}, headers={EXPECT: INFO.fingerprint})
    assert (answer.status_code, answer.json["error_type"]) == (412, "fingerprint_mismatch")
