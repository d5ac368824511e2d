"""Which fields are honoured, refused or ignored, on every protocol; null, and a byte order mark."""

import json

import msgspec
import pytest

from embedding_service.web.operation import operation_of

BODIES = {
    "/embed": {"texts": "a"},
    "/": {"inputs": "a"},
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
def test_a_misspelt_field_of_embed_is_refused_and_corrected(client, engine, name, meant):
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


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", CHANGES_VECTORS)
def test_what_would_change_the_vectors_is_refused_on_every_protocol(client, engine, path, name):
    response = client.post(path, json={**BODIES[path], name: CHANGES_VECTORS[name]})
    assert response.status_code == (422 if path == "/" else 400)
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
def test_what_changes_nothing_is_ignored(client, path, other):
    assert client.post(path, json=BODIES[path] | other).status_code == 200


def test_voyages_names_are_honoured_by_openais_route(client, engine):
    answer = client.post("/v1/embeddings", json={"input": "a", "output_dimension": 2, "truncation": False})
    assert len(answer.json["data"][0]["embedding"]) == 2
    assert (engine.requests[0].dimensions, engine.requests[0].truncate) == (2, False)


def test_nested_fields_are_judged_too(client):
    assert message(client.post("/api/embed", json={"input": "a", "options": {"dimensions": 2}})).startswith(
        "options.dimensions is not supported"
    )
    assert client.post("/api/embed", json={"input": "a", "options": {"num_ctx": 512}}).status_code == 200
    answer = client.post("/", json={"inputs": "a", "parameters": {"precision": "int8"}})
    assert message(answer).startswith("parameters.precision is not supported")
    answer = client.post("/vectors", json={"text": "a", "config": {"task": "x"}})
    assert message(answer).startswith("config.task is not supported")


def optional_fields(app):
    for rule in app.url_map.iter_rules():
        found = operation_of(app.view_functions[rule.endpoint])
        if rule.rule in BODIES and found is not None and found.body is not None:
            for field in msgspec.structs.fields(found.body.type):
                if not field.required and field.name not in BODIES[rule.rule]:
                    yield rule.rule, field.name


def test_null_means_left_out_on_every_route(app, client):
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


def test_the_pipelines_shapes_are_answered_at_the_root(client, engine):
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


def test_info_says_no_batch_below_one_text(client):
    info = client.get("/info").json
    assert info["max_batch_tokens"] >= info["batch_size"] * info["max_input_length"]
