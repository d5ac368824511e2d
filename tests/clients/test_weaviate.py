"""Weaviate's text2vec-transformers, with the requests that its Go client sends."""

import json

import pytest
import requests

from tests.clients.conftest import TEXTS


def post(service, body: dict) -> requests.Response:
    """Send bytes without a Content-Type, like Go's http.NewRequest."""
    answer = requests.post(f"{service.url}/vectors", data=json.dumps(body).encode(), timeout=60)
    assert "Content-Type" not in answer.request.headers
    return answer


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_one_object(service, close, text):
    # Go sends every field of its struct for requests and responses.
    config = {"pooling_strategy": "masked_mean", "task_type": "passage"}
    sent = {"text": text, "dims": 0, "vector": None, "error": "", "config": config}
    answer = post(service, sent)
    assert answer.status_code == 200
    body = answer.json()
    close([body["vector"]], [text])
    assert (body["text"], body["dim"], body["dims"]) == (text, 384, 384)


def test_a_batch(service, close):
    sent = {"texts": TEXTS, "config": {"task_type": "query", "dimensions": 128}}
    body = requests.post(f"{service.url}/vectors", json=sent, timeout=60).json()
    close(body["vectors"], TEXTS, truncate_dim=128)
    assert body["dims"] == 128


def test_meta_and_probes(service, model_name):
    for probe in ("ready", "live"):
        answer = requests.get(f"{service.url}/.well-known/{probe}", timeout=60)
        assert (answer.status_code, answer.content) == (204, b"")
    assert requests.get(f"{service.url}/meta", timeout=60).json()["model"] == model_name


@pytest.mark.parametrize(
    "body",
    [{}, {"text": 3}, {"texts": []}, {"text": "x", "config": {"dimensions": 0}}],
    ids=str,
)
def test_errors_are_its_own(service, body):
    answer = post(service, body)
    assert answer.status_code == 400
    assert answer.json().keys() == {"error"}
