"""What `aiperf profile` and `vllm bench serve` send, and what they read of the answers."""

import pytest
import requests

from tests.clients.conftest import TEXTS

MODEL = {"model": "sentence-transformers/all-MiniLM-L6-v2"}


@pytest.mark.parametrize(
    ("body", "headers", "count"),
    [
        (MODEL | {"input": TEXTS[:1]}, {"Accept": "application/json", "X-Correlation-ID": "any"}, 1),
        (MODEL | {"input": TEXTS[0], "truncate_prompt_tokens": -1}, {"x-request-id": "bench-1e3d-0"}, 1),
        (
            MODEL | {"input": TEXTS, "truncate_prompt_tokens": -1},
            {"x-request-id": "bench-1e3d-1"},
            len(TEXTS),
        ),
        # vLLM cuts its random texts by its own tokenizer, and sends them however long they are.
        (MODEL | {"input": "long " * 600, "truncate_prompt_tokens": -1}, {}, 1),
    ],
    ids=["aiperf", "vllm", "vllm with a batch", "vllm with a long text"],
)
def test_a_request_is_answered_with_what_is_read_of_it(service, body, headers, count):
    answer = service.post("/v1/embeddings", body, headers=headers)
    assert answer.status_code == 200
    assert [item["object"] for item in answer.json()["data"]] == ["embedding"] * count
    assert answer.json()["usage"]["prompt_tokens"] >= 3 * count


def test_aiperf_finds_the_metrics(service):
    assert requests.head(f"{service.url}/metrics", timeout=60).status_code == 200
    assert (
        "# TYPE embedding_requests_total counter" in requests.get(f"{service.url}/metrics", timeout=60).text
    )


def test_vllm_finds_the_model(service, model_name):
    assert requests.get(f"{service.url}/v1/models", timeout=60).json()["data"][0]["id"] == model_name
