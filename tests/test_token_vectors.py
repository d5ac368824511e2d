"""Vectors of tokens, compared with `SentenceTransformer.encode(output_value="token_embeddings")`."""

import jsonschema_rs
import numpy as np
import pytest
import requests

TEXTS = ["How do I reset my password?", "a", "", "東京 👩‍👩‍👧", "long " * 400]


def ask(service, path, **fields):
    return requests.post(f"{service.url}/{path}", json=fields, timeout=60)


@pytest.mark.parametrize(
    ("path", "fields", "vectors"),
    [
        ("embed_all", {"inputs": TEXTS}, lambda body: body),
        ("embed", {"texts": TEXTS, "output": "tokens"}, lambda body: body["embeddings"]),
    ],
    ids=["TEI", "native"],
)
def test_each_token_has_the_librarys_vector(service, oracle, path, fields, vectors):
    found = vectors(ask(service, path, **fields).json())
    expected = oracle.encode(TEXTS, output_value="token_embeddings")
    assert [len(own) for own in found] == [len(own) for own in expected]
    for mine, own in zip(found, expected, strict=True):
        assert np.abs(np.array(mine) - own.numpy()).max() < 1e-4


def test_a_prompt_comes_first(service, oracle):
    found = ask(service, "embed_all", inputs=["text"], prompt="query: ").json()
    [expected] = oracle.encode(["text"], prompt="query: ", output_value="token_embeddings")
    assert np.abs(np.array(found[0]) - expected.numpy()).max() < 1e-4


def test_the_response_counts_tokens(service):
    body = ask(service, "embed", texts=["one", "two words"], output="tokens").json()
    assert (body["count"], body["dimension"]) == (2, 384)
    assert body["usage"] == {"tokens": 3 + 4}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("embed_all", {"inputs": ["one", "two words"]}),
        ("embed", {"texts": ["one", "two words"], "output": "tokens"}),
    ],
    ids=["TEI", "native"],
)
def test_the_headers_have_the_tokens_and_the_time(service, path, fields):
    headers = ask(service, path, **fields).headers
    assert headers["x-compute-tokens"] == str(3 + 4)
    assert int(headers["x-total-time"]) >= 0
    assert "x-queue-time" not in headers


def test_the_response_is_as_described(service):
    document = requests.get(f"{service.url}/openapi.json", timeout=60).json()
    described = document["paths"]["/embed_all"]["post"]["responses"]["200"]
    assert {name.lower() for name in described["headers"]} == {
        *("x-compute-tokens", "x-total-time", "x-model-fingerprint", "x-request-id")
    }
    schema = described["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for(schema)
    validator.validate(ask(service, "embed_all", inputs=TEXTS).json())
    for wrong in ([[0.5]], [0.5], {}, [[["a"]]]):
        assert not validator.is_valid(wrong)


def test_too_many_numbers_are_rejected_before_they_are_computed(service):
    response = ask(service, "embed", texts=["word " * 400] * 100, output="tokens")
    assert (response.status_code, response.json()["field"]) == (413, "texts")
    assert "at most 4000000 numbers are allowed, so send fewer texts" in response.json()["reason"]


def test_the_prompt_counts_too(service):
    response = ask(service, "embed", texts=["a"] * 100, prompt="word " * 400, output="tokens")
    assert (response.status_code, response.json()["field"]) == (413, "texts")
    assert ask(service, "embed", texts=["a"] * 100, prompt="word ", output="tokens").status_code == 200


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dimensions": 64}, "dimensions"),
        ({"overflow": "mean"}, "overflow"),
        ({"precision": "int8"}, "precision"),
        ({"encoding_format": "base64"}, "encoding_format"),
        ({"on_error": "null"}, "on_error"),
        ({"truncate": False}, "truncate"),
        ({"priority": "background"}, "priority"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_used_with_tokens_are_rejected(service, fields, field):
    response = ask(service, "embed", texts="a", output="tokens", **fields)
    assert (response.status_code, response.json()["field"]) == (400, field)


def test_the_errors_of_tei(service):
    assert ask(service, "embed_all", inputs=[]).status_code == 400
    assert ask(service, "embed_all", inputs="a", prompt_name="nope").status_code == 422
