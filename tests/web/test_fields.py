"""Which fields are honoured, rejected or ignored in each protocol; null, and a byte order mark."""

import json

import msgspec
import pytest

from embedding_service.engine import Status
from embedding_service.web.route_spec import spec_of
from tests.fakes import INFO

BODIES = {
    "/embed": {"texts": "a"},
    "/": {"inputs": "a"},
    "/v1": {"inputs": "a"},
    "/v1/embeddings": {"input": "a"},
    "/api/embed": {"input": "a"},
    "/api/embeddings": {"prompt": "a"},
    "/vectors": {"text": "a"},
}


def message(response) -> str:
    error = response.json["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("normalise", "normalize"),
        ("dimension", "dimensions"),
        ("text", "texts"),
        ("inputType", "input_type"),
        ("promptName", "prompt_name"),
        ("encoding-format", "encoding_format"),
        ("truncat", "truncate"),
    ],
)
def test_a_misspelt_field_of_embed_is_rejected_with_the_right_name(client, engine, name, meant):
    response = client.post("/embed", json={"texts": ["a"], name: False})
    assert (response.status_code, response.json["error"]) == (400, f"{name} is not a field here; use {meant}")
    assert not engine.requests


@pytest.mark.parametrize("name", ["text", "input", "sentences", "content"])
def test_texts_under_another_name_get_the_hint(client, name):
    assert client.post("/embed", json={name: "a"}).json["error"] == f"{name} is not a field here; use texts"


CHANGES_VECTORS = {
    "output_dtype": "int8",
    "embedding_type": "binary",
    "embedding_types": ["float", "int8"],
    "precision": "ubinary",
    "late_chunking": True,
    "task": "retrieval.query",
    "output_dimensionality": 2,
    "pooling": "cls",
    "instruction": "find",
    "truncate_prompt_tokens": 4,
}


# Fields that a route honours; other tests show how.
HONOURED = {("/embed", "precision")} | {
    ("/v1/embeddings", name) for name in ("output_dtype", "embedding_type", "task", "truncate_prompt_tokens")
}


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in BODIES for name in CHANGES_VECTORS if (path, name) not in HONOURED],
)
def test_fields_that_change_the_vectors_are_rejected_in_every_protocol(client, engine, path, name):
    response = client.post(path, json={**BODIES[path], name: CHANGES_VECTORS[name]})
    assert response.status_code == (422 if path in ("/", "/v1") else 400)
    assert message(response).startswith(f"{name} is not")
    assert not engine.requests


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "other",
    [
        {"output_dtype": "float"},
        {"embedding_types": ["float"]},
        {"late_chunking": False},
        {"task": None},
        {"user": "u", "id": 7, "metadata": {"task": "x"}, "foo": 1},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_ignored(client, path, other):
    assert client.post(path, json=BODIES[path] | other).status_code == 200


def test_voyages_names_are_honoured_by_openais_route(client, engine):
    answer = client.post("/v1/embeddings", json={"input": "a", "output_dimension": 2, "truncation": False})
    assert len(answer.json["data"][0]["embedding"]) == 2
    assert (engine.requests[0].dimensions, engine.requests[0].overflow) == (2, "error")


def test_nested_fields_are_checked_too(client):
    assert message(client.post("/api/embed", json={"input": "a", "options": {"dimensions": 2}})).startswith(
        "options.dimensions is not supported"
    )
    assert client.post("/api/embed", json={"input": "a", "options": {"num_ctx": 512}}).status_code == 200
    answer = client.post("/", json={"inputs": "a", "parameters": {"precision": "int8"}})
    assert message(answer).startswith("parameters.precision is not supported")
    answer = client.post("/vectors", json={"text": "a", "config": {"task": "x"}})
    assert message(answer).startswith("config.task is not a field here; use task_type")


@pytest.mark.parametrize(
    ("path", "sent", "normalized"),
    [
        ("/api/embeddings", {}, False),
        ("/api/embeddings", {"normalize": False}, False),
        ("/api/embeddings", {"normalize": True}, True),
        ("/api/embeddings", {"normalized": False}, False),
        ("/api/embeddings", {"normalized": True}, None),
        ("/api/embeddings", {"normalize_embeddings": True}, None),
        ("/api/embeddings", {"options": {"normalize": True}}, None),
        ("/api/embed", {"normalize": True}, True),
        ("/api/embed", {"normalize": False}, False),
        ("/v1/embeddings", {"normalized": True}, True),
        ("/v1/embeddings", {"normalized": False}, False),
    ],
    ids=str,
)
def test_normalization_is_as_requested_or_rejected(client, engine, path, sent, normalized):
    response = client.post(path, json=BODIES[path] | sent)
    assert response.status_code == (400 if normalized is None else 200), response.text
    assert [request.normalize for request in engine.requests] == ([] if normalized is None else [normalized])


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
@pytest.mark.parametrize(
    ("window", "status"), [(9, 400), (10, 200), (16, 200), (8192, 200), (0, 200), (None, 200)]
)
def test_a_window_shorter_than_a_text_is_rejected(client, path, window, status):
    (field,) = BODIES[path]
    response = client.post(path, json={field: "ten tokens", "options": {"num_ctx": window}})
    assert response.status_code == status
    if status == 400:
        assert message(response) == "options.num_ctx must be at least 10 for these texts, or left out"


@pytest.mark.parametrize(
    ("strategy", "status"), [("masked_mean", 200), ("mean", 200), ("", 200), ("cls", 400), ("nonsense", 400)]
)
def test_another_pooling_than_the_models_is_rejected(client, strategy, status):
    response = client.post("/vectors", json={"text": "a", "config": {"pooling_strategy": strategy}})
    assert response.status_code == status
    if status == 400:
        assert message(response).startswith(f"config.pooling_strategy is {strategy!r}")


def test_v1_accepts_inputs_and_names_them_in_errors(client):
    assert client.post("/v1", json={"inputs": ["a", "bb"]}).json == [[1.0, 0.0, 1.0], [2.0, 0.0, 1.0]]
    assert client.post("/v1", json={"input": "a"}).json["error"] == "input is not a field here; use inputs"


def optional_fields(app):
    for rule in app.url_map.iter_rules():
        found = spec_of(app.view_functions[rule.endpoint])
        if rule.rule in BODIES and found is not None and found.body is not None:
            for field in msgspec.structs.fields(found.body.type):
                if not field.required and field.name not in BODIES[rule.rule]:
                    yield rule.rule, field.name


def test_null_means_not_set_on_every_route(app, client):
    fields = list(optional_fields(app))
    assert len(fields) > 25
    for path, name in fields:
        answer = client.post(path, json={**BODIES[path], name: None})
        assert answer.status_code == 200, (path, name, answer.text)
    config = {"task_type": None, "dimensions": None}
    assert client.post("/vectors", json={"text": "a", "texts": None, "config": config}).status_code == 200
    assert client.post("/embed", json={"texts": None, "inputs": "a"}).json == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_byte_order_mark_and_any_label_are_accepted(client, path, content_type):
    raw = b"\xef\xbb\xbf" + json.dumps(BODIES[path]).encode()
    assert client.post(path, data=raw, headers={"Content-Type": content_type}).status_code == 200


def test_the_bodies_of_pipelines_are_accepted_at_the_root(client, engine):
    inputs = {"source_sentence": "a", "sentences": ["b", "cc"]}
    answer = client.post("/", json={"inputs": inputs, "parameters": {}})
    assert answer.status_code == 200
    assert len(answer.json) == 2
    answer = client.post("/", json={"inputs": ["a"], "normalize": False, "parameters": {"dimensions": 2}})
    assert answer.json == [[1.0, 0.0]]
    assert engine.requests[-1].normalize is False
    assert client.post("/", json={"inputs": {"source_sentence": "a"}}).status_code == 422


@pytest.mark.parametrize(
    "path", ["//v1/embeddings", "/v1//embeddings", "/v1/embeddings/", "///v1///embeddings"]
)
def test_double_slashes_are_served(client, path):
    assert client.post(path, json={"input": "a"}).status_code == 200


@pytest.mark.parametrize("page", ["/docs", "/docs/"])
def test_the_pages_links_are_relative(client, page):
    text = client.get(page).text
    assert 'src="/' not in text and 'href="/' not in text and 'data-document="/' not in text
    assert client.get("/openapi.json").json["servers"] == [{"url": "."}]


def test_max_batch_tokens_covers_a_batch_of_the_longest_texts(client):
    info = client.get("/info").json
    assert info["max_batch_tokens"] >= info["batch_size"] * info["max_input_length"]


def test_without_truncation_the_limit_is_the_number_of_characters(client, engine):
    info = msgspec.structs.replace(INFO, reads_whole_texts=True)
    engine.current = Status(state="healthy", info=info)
    body = client.get("/info").json
    assert body["max_seq_length"] == body["max_input_length"] == 100
    assert body["max_batch_tokens"] >= body["batch_size"] * 100
    assert client.get("/meta").json["max_seq_length"] == 100
    assert client.post("/api/show", json={}).json["model_info"]["bert.context_length"] == 100


def test_an_error_has_field_index_and_reason_separately(client):
    body = client.post("/embed", json={"texts": ["a", "b" * 101]}).json
    assert (body["field"], body["index"]) == ("texts", 1)
    assert body["error"] == f"texts[1] {body['reason']}"
