"""POST /embed: requests, responses and errors."""

import base64
import gc
import gzip
import tracemalloc
from urllib.parse import unquote

import numpy as np
import pytest
from werkzeug.test import EnvironBuilder

from embedding_service.errors import DeadlineExceeded, ModelFailure, Overloaded, Unavailable
from embedding_service.settings.config import Config
from embedding_service.web import body as bodies
from embedding_service.web.factory import create_app
from tests.fakes import FakeEngine


def test_one_string_gives_nested_embeddings(client):
    body = client.post("/embed", json={"texts": "four"}).json
    assert body["embeddings"] == [[4.0, 0.0, 1.0]]
    assert (body["dimension"], body["model"], body["count"]) == (3, "fake/model", 1)
    assert body["processing_time_ms"] >= 0
    assert body["usage"] == {"tokens": 4, "truncated": []}


@pytest.mark.parametrize("name", ["модель", "模型 v2", "org/model-1.5"])
def test_a_model_name_in_any_script_fits_a_header(name):
    served = create_app(FakeEngine(), Config(served_model_name=name)).test_client()
    answer = served.post("/embed", json={"texts": "four"}, headers={"Accept": "application/x-npy"})
    assert answer.status_code == 200
    assert answer.headers["x-model"].isascii()
    assert unquote(answer.headers["x-model"]) == name


def test_many_texts_keep_their_order(client):
    body = client.post("/embed", json={"texts": ["a", "bbb", ""]}).json
    assert [row[0] for row in body["embeddings"]] == [1.0, 3.0, 0.0]
    assert body["count"] == 3


def test_options_reach_the_engine(client, engine):
    options = {"normalize": False, "prompt_name": "query", "dimensions": 2, "truncate": False}
    body = client.post("/embed", json={"texts": ["a"], "input_type": "document", **options}).json
    request = engine.requests[0]
    assert (request.normalize, request.prompt_name, request.dimensions, request.overflow) == (
        False,
        "query",
        2,
        "error",
    )
    assert request.input_type == "document"
    assert body["dimension"] == 2


def test_base64_is_little_endian_float32(client):
    body = client.post("/embed", json={"texts": ["abc"], "encoding_format": "base64"}).json
    vector = np.frombuffer(base64.b64decode(body["embeddings"][0]), "<f4")
    assert vector.tolist() == [3.0, 0.0, 1.0]


def test_unknown_fields_are_ignored(client):
    assert client.post("/embed", json={"texts": "a", "future": {"x": [1]}}).status_code == 200


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "", "application/octet-stream"])
def test_json_is_read_whatever_the_content_type_says(client, content_type):
    response = client.post("/embed", data=b'{"texts":"a"}', headers={"Content-Type": content_type})
    assert response.status_code == 200


BAD_BODIES = [
    pytest.param(b"", "empty", id="empty"),
    pytest.param(b"{", "not valid JSON", id="cut off"),
    pytest.param(b'{"texts": NaN}', "not valid JSON", id="NaN literal"),
    pytest.param(b'{"texts": "\xff"}', "not valid UTF-8", id="bad UTF-8"),
    pytest.param(b'{"texts": "\\ud800"}', "", id="lone surrogate"),
    pytest.param(b'{"texts": ' + b"[" * 900 + b"]" * 900 + b"}", "", id="deep"),
    pytest.param(b"[]", "object", id="not an object"),
    pytest.param(b"{}", "texts", id="no texts"),
    pytest.param(b'{"texts": []}', "texts is empty", id="no text"),
    pytest.param(b'{"texts": [1]}', "texts[0]", id="a number"),
    pytest.param(b'{"texts": ["a", null]}', "texts[1]", id="null"),
    pytest.param(b'{"texts": "a", "normalize": "yes"}', "normalize", id="normalize is a string"),
    pytest.param(b'{"texts": "a", "dimensions": 0}', "dimensions", id="no dimension"),
    pytest.param(b'{"texts": "a", "input_type": "poem"}', "input_type", id="unknown input_type"),
    pytest.param(b'{"texts": "a", "encoding_format": "hex"}', "encoding_format", id="unknown format"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES)
def test_bad_bodies_get_a_400_that_says_where(client, engine, body, words):
    response = client.post("/embed", data=body, content_type="application/json")
    assert response.status_code == 400
    assert response.json["error_type"] == "validation"
    assert words in response.json["error"]
    assert response.json["request_id"] == response.headers["X-Request-ID"]
    assert not engine.requests


FORMS = ["application/x-www-form-urlencoded", "multipart/form-data"]


@pytest.mark.parametrize("content_type", FORMS)
def test_json_that_curl_labels_as_a_form_is_read(client, content_type):
    assert client.post("/embed", data=b'{"texts":"a"}', content_type=content_type).status_code == 200


@pytest.mark.parametrize("content_type", FORMS)
def test_forms_get_a_415_with_a_remedy(client, content_type):
    response = client.post("/embed", data=b"texts=a", content_type=content_type)
    assert response.status_code == 415
    assert "-H 'Content-Type: application/json'" in response.json["error"]


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip"])
def test_other_content_encodings_than_gzip_get_a_415(client, encoding):
    response = client.post("/embed", data=b"\x1f\x8b", headers={"Content-Encoding": encoding})
    assert (response.status_code, response.json["error_type"]) == (415, "unsupported_media_type")
    assert response.json["error"] == f"the content encoding {encoding} is not supported; send gzip or none"


WHOLE = gzip.compress(b'{"texts": "a"}')


@pytest.mark.parametrize(
    ("sent", "status", "error"),
    [
        (gzip.compress(b'{"texts"') + gzip.compress(b': "a"}'), 200, None),
        (WHOLE[:-5], 400, "the gzip body is incomplete"),
        (WHOLE[:10] + b"\xff" + WHOLE[11:], 400, "the body is not valid gzip"),
        (WHOLE + b"rest", 400, "the body is not valid gzip"),
        (gzip.compress(b" " * 2035 + b'{"texts":"a"}'), 200, None),
        (gzip.compress(b" " * 2036 + b'{"texts":"a"}'), 413, "the decompressed body is over 2048 bytes"),
        (gzip.compress(bytes(100_000)), 413, "the decompressed body is over 2048 bytes"),
        (gzip.compress(b"") * 60 + WHOLE, 200, None),
    ],
    ids=[
        "two members",
        "cut off",
        "damaged",
        "something after it",
        "just fits",
        "a byte more",
        "a bomb",
        "empty members",
    ],
)
def test_the_limit_applies_to_the_decompressed_body(client, sent, status, error):
    response = client.post("/embed", data=sent, headers={"Content-Encoding": "gzip"})
    assert response.status_code == status
    assert error is None or response.json["error"].startswith(error)


def test_the_number_of_gzip_members_is_limited(client, monkeypatch):
    """Even an empty one takes time, so their number is limited."""
    monkeypatch.setattr(bodies, "MAX_MEMBERS", 3)
    empty = gzip.compress(b"")
    headers = {"Content-Encoding": "gzip"}
    assert client.post("/embed", data=empty * 2 + WHOLE, headers=headers).status_code == 200
    refused = client.post("/embed", data=empty * 3 + WHOLE, headers=headers)
    assert (refused.status_code, refused.json["error"]) == (400, "the gzip body has more than 3 members")


@pytest.mark.parametrize("size", [1, 2, 7, 18])
def test_a_gzip_body_is_read_in_blocks(client, monkeypatch, size):
    monkeypatch.setattr(bodies, "BLOCK_BYTES", size)
    sent = gzip.compress(b'{"texts"') + gzip.compress(b': "a"}')
    assert client.post("/embed", data=sent, headers={"Content-Encoding": "gzip"}).status_code == 200
    cut = client.post("/embed", data=sent[:-5], headers={"Content-Encoding": "gzip"})
    assert cut.json["error"] == "the gzip body is incomplete"


def test_a_gzip_bomb_is_not_decompressed(client):
    """A body of 1 MB that would become 1 GB must not use much memory."""
    bomb = gzip.compress(bytes(1 << 20)) * 2
    tracemalloc.start()
    try:
        assert client.post("/embed", data=bomb, headers={"Content-Encoding": "gzip"}).status_code == 413
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(["a"] * 9, id="too many texts"),
        pytest.param(["a", "b" * 101], id="a text too long"),
        pytest.param(["c" * 90] * 8 * 3, id="both"),
        pytest.param("d" * 3000, id="a body too large"),
    ],
)
def test_requests_over_a_limit_get_a_413(client, engine, texts):
    response = client.post("/embed", json={"texts": texts})
    assert (response.status_code, response.json["error_type"]) == (413, "too_large")
    assert not engine.requests


@pytest.mark.parametrize(
    ("error", "status", "error_type", "retry"),
    [
        (Overloaded("full", retry_after_seconds=0.25), 429, "overloaded", ("1", "250")),
        (Unavailable("loading", retry_after_seconds=1), 503, "unavailable", ("1", "1000")),
        (DeadlineExceeded("late"), 504, "timeout", (None, None)),
        (ModelFailure("texts[0] could not be embedded"), 500, "internal", (None, None)),
    ],
)
def test_the_engines_errors_become_statuses(client, engine, error, status, error_type, retry):
    engine.error = error
    response = client.post("/embed", json={"texts": "a"})
    assert (response.status_code, response.json["error_type"]) == (status, error_type)
    assert response.json["error"] == error.message
    assert (response.headers.get("Retry-After"), response.headers.get("retry-after-ms")) == retry


def test_a_bug_is_a_generic_500_and_the_log_has_the_details(client, engine, caplog):
    engine.error = RuntimeError("secret detail")
    response = client.post("/embed", json={"texts": "a"})
    assert (response.status_code, response.json["error_type"]) == (500, "internal")
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_requests_over_the_limit_get_429_and_health_still_answers(app, engine, client):
    app.extensions["embedding_service"].places.clear()
    assert client.post("/embed", json={"texts": "a"}).status_code == 429
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/embed", "/", "/similarity", "/v1/embeddings", "/invocations", "/predict"])
@pytest.mark.parametrize("name", ["inputs", "texts", "input", "instances"])
def test_bad_utf8_anywhere_is_the_callers_fault(client, path, name):
    for value in (b'"\xff"', b'["\xff"]', b'{"source_sentence": "\xff", "sentences": ["a"]}', b'{"\xff": 1}'):
        answer = client.post(path, data=b'{"%b": %b}' % (name.encode(), value))
        assert answer.status_code in (400, 422)
        assert "not valid UTF-8" in answer.text


@pytest.mark.parametrize("end", ['"}', '"]}', ' a text after it"}'])
def test_half_of_a_surrogate_pair_is_not_called_a_truncated_body(client, end):
    answer = client.post("/embed", data='{"texts": ' + "[" * ("]" in end) + '"\\ud800' + end)
    assert answer.status_code == 400
    assert "surrogate pair" in answer.json["error"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/embed", {"texts": "a"}),
        ("POST", "/v1/embeddings", {"input": ["a"]}),
        ("GET", "/info", None),
    ],
)
def test_a_request_leaves_nothing_for_the_collector(app, method, path, body):
    environs = [EnvironBuilder(method=method, path=path, json=body).get_environ() for _ in range(6)]
    b"".join(app(environs.pop(), lambda *_: None))
    gc.collect()
    gc.disable()
    try:
        while environs:
            b"".join(app(environs.pop(), lambda *_: None))
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_routes_without_arguments_are_matched_like_the_others(app, client):
    """They are looked up by their path; what only matching can tell stays as it is."""
    assert ("POST", "/embed") in app.plain_routes
    assert client.post("/embed/", json={"texts": "a"}).status_code == 200
    assert client.post("/v1//embeddings", json={"input": "a"}).status_code == 200
    refused = client.delete("/embed")
    assert (refused.status_code, refused.json["error_type"]) == (405, "method_not_allowed")
    assert "POST" in refused.headers["Allow"]
    assert set(client.options("/").headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}
