"""The same error in each protocol, with that protocol's own names."""

import logging

import msgspec
import pytest

from embedding_service import errors
from embedding_service.errors import BY_NAME, InvalidRequest, ModelFailure
from embedding_service.sharing import wire


def message(response) -> str:
    error = response.json["error"]
    return error if isinstance(error, str) else error["message"]


TWO = ["a", "b"]
TEXT_AT_FAULT = [
    ("/embed", {"texts": TWO}, "texts[1]"),
    ("/embed", {"inputs": TWO}, "inputs[1]"),
    ("/", {"inputs": TWO}, "inputs[1]"),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": TWO}}, "inputs.sentences[0]"),
    ("/v1/embeddings", {"input": TWO}, "input[1]"),
    ("/api/embed", {"input": TWO}, "input[1]"),
    ("/api/embeddings", {"prompt": "a"}, "prompt"),
    ("/vectors", {"texts": TWO}, "texts[1]"),
    ("/vectors", {"text": "a"}, "text"),
]


@pytest.mark.parametrize(("path", "body", "name"), TEXT_AT_FAULT, ids=str)
def test_a_bad_text_has_the_callers_name_for_it(client, engine, path, body, name):
    engine.error = ModelFailure("could not be embedded", index=1)
    assert message(client.post(path, json=body)) == f"{name} could not be embedded"


def test_the_source_sentence_is_the_first_text_of_a_comparison(client, engine):
    engine.error = ModelFailure("could not be embedded", index=0)
    answer = client.post("/similarity", json={"inputs": {"source_sentence": "a", "sentences": TWO}})
    assert message(answer) == "inputs.source_sentence could not be embedded"


@pytest.mark.parametrize(
    ("path", "body", "field", "name"),
    [
        ("/embed", {"texts": "a"}, "dimensions", "dimensions"),
        ("/v1/embeddings", {"input": "a"}, "dimensions", "dimensions"),
        ("/vectors", {"text": "a"}, "dimensions", "config.dimensions"),
        ("/", {"inputs": "a"}, "truncation_side", "truncation_direction"),
        ("/", {"inputs": "a"}, "prompt_name", "prompt_name"),
    ],
)
def test_a_bad_field_has_the_callers_name_for_it(client, engine, path, body, field, name):
    engine.error = InvalidRequest("is wrong", field=field)
    assert message(client.post(path, json=body)) == f"{name} is wrong"


def test_openais_param_is_the_field(client, engine):
    engine.error = InvalidRequest("is not valid Unicode", index=1)
    assert client.post("/v1/embeddings", json={"input": TWO}).json["error"]["param"] == "input"
    answer = client.post("/v1/embeddings", json={"input": ["x" * 101]})
    assert answer.json["error"]["param"] == "input"
    assert message(answer).startswith("input[0] has 101 characters")


@pytest.mark.parametrize("kind", list(BY_NAME.values()), ids=lambda kind: kind.__name__)
def test_the_wire_carries_all_parts_of_an_error(kind):
    sent = kind("is wrong", index=3, field="texts", retry_after_seconds=0.5)
    packed = msgspec.msgpack.encode(wire.ErrorReply.of(7, sent))
    got = msgspec.msgpack.decode(packed, type=wire.ErrorReply)
    assert got.number == 7
    assert type(got.error()) is kind
    assert vars(got.error()) == vars(sent)


def test_an_error_of_another_version_is_still_an_error():
    assert isinstance(wire.ErrorReply(1, "Unheard", "of", None, None, None).error(), errors.ServiceError)


BODIES = [
    ({"texts": 3}, "texts must be a string or an array of strings, not 3"),
    ({"texts": ["a", None]}, "texts[1] must be a string, not null"),
    ({"texts": {"a": 1}}, "texts must be a string or an array of strings, not an object"),
    ({"texts": "a", "dimensions": 0}, "dimensions must be a whole number from 1 to 65536, not 0"),
    ({"texts": "a", "dimensions": "9"}, 'dimensions must be a whole number from 1 to 65536, not "9"'),
    ({"texts": "a", "dimensions": 1.5}, "dimensions must be a whole number from 1 to 65536, not 1.5"),
    ({"texts": "a", "dimensions": True}, "dimensions must be a whole number from 1 to 65536, not true"),
    ({"texts": "a", "normalize": "yes" * 20}, "normalize must be true or false, not a string"),
    ({"texts": "a", "output": "token"}, 'output must be "sentence" or "tokens", not "token"'),
    ({"texts": "a", "output": 3}, 'output must be "sentence" or "tokens", not 3'),
    ({}, "texts is missing"),
    ([], "the body must be an object, not an array"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=str)
def test_an_invalid_body_is_explained_in_terms_of_json(client, body, words):
    answer = client.post("/embed", json=body)
    assert (answer.status_code, answer.json["error"]) == (400, words)


def test_a_nested_field_has_its_path(client):
    answer = client.post("/vectors", json={"text": "a", "config": {"dimensions": "9"}})
    assert message(answer).startswith("config.dimensions must be a whole number")
    answer = client.post("/similarity", json={"inputs": {"source_sentence": "a", "sentences": ["b", 1]}})
    assert message(answer) == "inputs.sentences[1] must be a string, not 1"


def test_a_number_out_of_range_is_explained(client):
    answer = client.post("/embed", data=b'{"texts": "a", "dimensions": 1' + b"0" * 400 + b".5}")
    assert (answer.status_code, answer.json["error_type"]) == (400, "validation")
    assert "out of range" in answer.json["error"]


def test_log_lines_have_the_id_of_the_request_if_there_is_one(app):
    from embedding_service.observability.logs import TextFormatter

    log = logging.getLogger("embedding_service.test")
    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(TextFormatter().format(record))

    handler = Lines()
    log.addHandler(handler)
    try:
        log.warning("before")
        with app.test_request_context("/health", headers={"X-Request-ID": "mine"}):
            log.warning("within")
        log.warning("after")
    finally:
        log.removeHandler(handler)
    assert ["[mine]" in line for line in lines] == [False, True, False]
