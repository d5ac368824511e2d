"""The routes that SageMaker and Vertex AI call."""

import pytest
import requests

from embedding_service.settings import config
from embedding_service.settings.config import Config
from embedding_service.web.factory import create_app
from tests.clients.conftest import TEXTS
from tests.fakes import FakeEngine


def test_sagemakers_ping_and_invocations(service, close):
    assert requests.get(f"{service.url}/ping", timeout=60).status_code == 200
    answer = requests.post(f"{service.url}/invocations", json={"inputs": TEXTS}, timeout=60)
    close(answer.json(), TEXTS)


def test_vertex_predicts_a_vector_for_each_instance(service, close):
    body = {"instances": [{"inputs": text} for text in TEXTS], "parameters": {"dimensions": 64}}
    answer = requests.post(f"{service.url}/predict", json=body, timeout=60)
    close(answer.json()["predictions"], TEXTS, truncate_dim=64)
    of_tei = requests.post(f"{service.url}/vertex", json=body, timeout=60)
    assert of_tei.json()["predictions"] == [[vector] for vector in answer.json()["predictions"]]


def test_an_instance_of_teis_has_the_fields_of_embed(service, close):
    inputs = [TEXTS[0], [TEXTS[1], TEXTS[2]], [[101, 7592, 2088, 102]]]
    instances = [{"type": "embed", "inputs": each, "dimensions": 64} for each in inputs]
    answer = requests.post(f"{service.url}/vertex", json={"instances": instances}, timeout=60)
    predictions = answer.json()["predictions"]
    assert [len(each) for each in predictions] == [1, 2, 1]
    close([vector for each in predictions for vector in each], [*TEXTS[:3], "hello world"], truncate_dim=64)


def test_an_instance_may_be_a_string_or_hold_it_under_another_name(service, close):
    instances = [TEXTS[0], {"inputs": TEXTS[1]}, {"content": TEXTS[2]}, {"text": TEXTS[3]}, *TEXTS[4:]]
    answer = requests.post(f"{service.url}/predict", json={"instances": instances}, timeout=60)
    close(answer.json()["predictions"], TEXTS)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"instances": []}, "instances is empty; send at least one text"),
        ({"instances": "a"}, 'instances must be an array of strings, not "a"'),
        ({"instances": ["a", 1]}, "instances[1] must be a string or an object, not 1"),
        (
            {"instances": ["a", {"inputs": 1}]},
            "instances[1].inputs must be a string or an array of strings, not 1",
        ),
        ({"instances": ["a", {"prompt": "b"}]}, "instances[1] must have its text in one of inputs, content"),
        ({"instances": ["a", {"inputs": ["b", "c"]}]}, "instances[1] must have one text"),
        ({"instances": ["a", {"inputs": [[-1]]}]}, "instances[1] holds -1, which is not a token id"),
        ({"instances": ["a", {"text": "b", "dimensions": 8}]}, "instances must all have the same options"),
        ({"instances": [{"text": "a", "content": "b"}]}, "instances[0] must have its text in one of inputs"),
        (
            {"instances": ["a", {"content": "b", "task_type": "RETRIEVAL_QUERY"}]},
            "instances[1] has a task_type, which is not supported; send parameters.prompt_name",
        ),
        (
            {"instances": [{"inputs": "a"}, {"inputs": "b " * 300}], "parameters": {"truncate": False}},
            "instances[1] has more than 256 tokens",
        ),
        (
            {"instances": ["a"], "parameters": {"outputDimensionality": 64}},
            "parameters.outputDimensionality is not a field here; use dimensions",
        ),
    ],
    ids=[
        "none",
        "no list",
        "a number",
        "no text",
        "another name",
        "several texts",
        "a negative id",
        "other options",
        "two texts",
        "a task",
        "too long",
        "a parameter",
    ],
)
def test_an_error_names_the_instance_or_parameter(service, body, error):
    answer = requests.post(f"{service.url}/predict", json=body, timeout=60)
    # As in Text Embeddings Inference, which has a status of its own for nothing to embed.
    assert answer.status_code == (400 if answer.json()["error_type"] == "Empty" else 422)
    assert answer.json()["error"].startswith(error)


def test_the_platforms_port_counts_if_port_is_not_set():
    assert config.load({"AIP_HTTP_PORT": "8080"}).port == 8080
    assert config.load({"AIP_HTTP_PORT": "8080", "PORT": "9000"}).port == 9000
    with pytest.raises(config.ConfigError, match="PORT='x' is not allowed"):
        config.load({"AIP_HTTP_PORT": "x"})


HEALTH, PREDICT = "/v1/endpoints/7/deployedModels/8", "/v1/endpoints/7/deployedModels/8:predict"


def test_the_paths_that_vertex_sets_are_served(start_without_model):
    running = start_without_model(
        AIP_HEALTH_ROUTE=HEALTH, AIP_PREDICT_ROUTE=PREDICT, API_KEYS="key"
    ).wait_ready()
    assert requests.get(running.url + HEALTH, timeout=60).json()["status"] == "healthy"
    body = {"instances": [{"content": "one"}, {"content": "two"}]}
    refused = running.post(PREDICT, body)
    assert (refused.status_code, refused.json()["error_type"]) == (401, "Unauthorized")
    key = {"X-API-Key": "key"}
    predicted, usual = (running.post(path, body, headers=key).json() for path in (PREDICT, "/predict"))
    assert len(predicted["predictions"]) == 2 and predicted == usual
    document = requests.get(f"{running.url}/openapi.json", headers=key, timeout=60).json()
    assert {HEALTH, PREDICT, "/predict"} <= set(document["paths"])


def test_a_path_of_vertex_that_is_served_already_is_left_alone():
    app = create_app(FakeEngine(), Config(aip_health_route="/health", aip_predict_route="/predict"))
    plain = create_app(FakeEngine(), Config())
    assert len(list(app.url_map.iter_rules())) == len(list(plain.url_map.iter_rules()))


@pytest.mark.parametrize("path", ["/", "predict", "/a b", "/<name>", "/a?b"])
def test_a_path_that_cannot_be_served_stops_the_start(path):
    with pytest.raises(config.ConfigError, match="a path such as /predict"):
        config.load({"AIP_PREDICT_ROUTE": path})
