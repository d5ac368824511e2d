"""The routes that SageMaker and Vertex AI call."""

import pytest
import requests

from embedding_service import config
from tests.clients.conftest import TEXTS


def test_sagemakers_ping_and_invocations(service, close):
    assert requests.get(f"{service.url}/ping", timeout=10).status_code == 200
    answer = requests.post(f"{service.url}/invocations", json={"inputs": TEXTS}, timeout=60)
    close(answer.json(), TEXTS)


def test_vertex_predicts_a_vector_for_each_instance(service, close):
    body = {"instances": [{"inputs": text} for text in TEXTS], "parameters": {"dimensions": 64}}
    answer = requests.post(f"{service.url}/predict", json=body, timeout=60)
    close(answer.json()["predictions"], TEXTS, truncate_dim=64)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"instances": []}, "instances is empty; send at least one text"),
        ({"instances": [{"inputs": 1}]}, "instances"),
        (
            {"instances": [{"inputs": "a"}, {"inputs": "b " * 300}], "parameters": {"truncate": False}},
            "instances[1] has more than 256 tokens",
        ),
    ],
    ids=["none", "no text", "too long"],
)
def test_an_error_names_the_instance(service, body, error):
    answer = requests.post(f"{service.url}/predict", json=body, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(error)


def test_the_platforms_port_counts_if_port_is_not_set():
    assert config.load({"AIP_HTTP_PORT": "8080"}).port == 8080
    assert config.load({"AIP_HTTP_PORT": "8080", "PORT": "9000"}).port == 9000
    with pytest.raises(config.ConfigError, match="PORT='x' is not allowed"):
        config.load({"AIP_HTTP_PORT": "x"})
