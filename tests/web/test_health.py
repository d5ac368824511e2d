"""Health, info, request ids and unknown routes."""

import pytest

from embedding_service.engine import Status
from tests.fakes import INFO


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_healthy(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert response.json == {
        "status": "healthy",
        "model": "fake/model",
        "device": "cpu",
        "embedding_dimension": 3,
    }
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("state", ["loading", "unhealthy", "draining"])
@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_every_other_state_is_a_503_with_its_reason(client, engine, path, state):
    engine.current = Status(state=state, reason="because")
    response = client.get(path)
    assert response.status_code == 503
    assert response.json == {"status": state, "reason": "because"}
    assert response.headers["Retry-After"] == "1"


def test_a_worker_that_drains_says_so(client, app):
    app.extensions["embedding_service"].draining = lambda: True
    response = client.get("/health")
    assert (response.status_code, response.json["status"]) == (503, "draining")


def test_live_is_independent_of_readiness(client, engine):
    engine.current = Status(state="loading", reason="loading")
    assert client.get("/health/live").status_code == 200
    engine.restart = True
    assert client.get("/health/live").status_code == 503


def test_info_has_our_names_and_teis(client):
    body = client.get("/info").json
    users = ("model_name", "embedding_dimension", "max_seq_length", "device", "batch_size")
    assert [body[name] for name in users] == ["fake/model", 3, 16, "cpu", 32]
    assert body["model_id"] == "fake/model"
    assert body["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (body["max_input_length"], body["max_client_batch_size"]) == (16, 8)
    assert (body["backend"], body["fingerprint"]) == (INFO.backend, INFO.fingerprint)


def test_info_before_the_model_is_loaded_is_a_503(client, engine):
    engine.current = Status(state="loading", reason="loading fake/model")
    response = client.get("/info")
    assert (response.status_code, response.json["error_type"]) == (503, "unavailable")


def test_a_valid_request_id_is_returned(client):
    assert client.get("/health", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "<script>"])
def test_an_invalid_request_id_is_replaced(client, given):
    got = client.get("/health", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert got != given
    assert len(got) == 32


def test_unknown_path(client):
    response = client.get("/nowhere")
    assert (response.status_code, response.json["error_type"]) == (404, "not_found")


def test_wrong_method_names_the_right_ones(client):
    response = client.get("/embed")
    assert (response.status_code, response.json["error_type"]) == (405, "method_not_allowed")
    assert "POST" in response.headers["Allow"]
