"""ACCESS_LOG, SLOW_REQUEST_SECONDS and the caller's trace in the log."""

import json
import logging

import pytest

from embedding_service.observability import logs
from embedding_service.settings.config import Config
from embedding_service.web.factory import create_app
from tests.fakes import FakeEngine

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


class Lines(logging.Handler):
    """Keeps the formatted lines; they are formatted during the request."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines():
    logger, added = logging.getLogger("embedding_service"), []
    level = logger.level
    logger.setLevel(logging.INFO)

    def keep(formatter=None):
        handler = Lines(formatter or logs.JsonFormatter())
        logger.addHandler(handler)
        added.append(handler)
        return handler.lines

    yield keep
    logger.setLevel(level)
    for handler in added:
        logger.removeHandler(handler)


def served(**settings):
    return create_app(FakeEngine(), Config(**settings)).test_client()


def test_nothing_is_logged_by_default(lines):
    kept = lines()
    served().post("/embed", json={"texts": "a"})
    assert kept == []


def test_a_request_is_a_line_with_its_numbers(lines):
    kept = lines()
    client = served(access_log=True)
    client.post("/embed", json={"texts": ["a", "bc"]}, headers={"X-Request-ID": "mine"})
    [line] = map(json.loads, kept)
    assert line["ms"] >= 0
    assert {name: line[name] for name in line if name not in ("time", "process", "ms", "message")} == {
        "level": "info",
        "logger": "web.access_log",
        "request_id": "mine",
        "method": "POST",
        "route": "/embed",
        "status": 200,
        "texts": 2,
        "tokens": 3,
        "queue_ms": 2,
        "inference_ms": 3,
        "truncated": 0,
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [("/embed_all", {"inputs": ["a", "bc"]}), ("/embed", {"texts": ["a", "bc"], "output": "tokens"})],
    ids=["TEI", "native"],
)
@pytest.mark.parametrize("settings", [{"access_log": True}, {"slow_request_seconds": 1e-9}], ids=str)
def test_requests_for_the_vectors_of_tokens_have_their_numbers_too(lines, path, body, settings):
    kept = lines()
    response = served(**settings).post(path, json=body)
    [line] = map(json.loads, kept)
    assert (response.status_code, line["texts"], line["tokens"]) == (200, 2, 3)
    assert "queue_ms" not in line


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"overflow": "chunks"}, 2),
        ({"overflow": "mean"}, 2),
        ({"output": "tokens"}, 2),
        ({"on_error": "null"}, 2),
        ({"texts": []}, 0),
    ],
    ids=["chunks", "mean", "tokens", "partial", "none"],
)
def test_texts_are_those_of_the_request(lines, fields, texts):
    kept = lines()
    served(access_log=True).post("/embed", json={"texts": ["a", "bc"]} | fields)
    assert [line["texts"] for line in map(json.loads, kept) if "route" in line] == [texts]


def test_the_line_as_text(lines):
    kept = lines(logs.TextFormatter())
    served(access_log=True).get("/nowhere/at all", headers={"X-Request-ID": "mine"})
    assert len(kept) == 1
    assert "INFO    web.access_log [mine] request method=GET route=/nowhere/at all status=404 ms=" in kept[0]


@pytest.mark.parametrize(("seconds", "level"), [(1e-9, "warning"), (3600, None)])
def test_a_slow_request_is_a_warning(lines, seconds, level):
    kept = lines()
    served(slow_request_seconds=seconds).post("/embed", json={"texts": "a"})
    assert [json.loads(line)["level"] for line in kept] == ([level] if level else [])
    assert all(json.loads(line)["message"].startswith("slow request method=POST") for line in kept)


def test_a_slow_request_is_logged_once(lines):
    kept = lines()
    served(access_log=True, slow_request_seconds=1e-9).post("/embed", json={"texts": "a"})
    assert [json.loads(line)["level"] for line in kept] == ["warning"]


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (TRACEPARENT, TRACE),
        (f"01-{TRACE}-00f067aa0ba902b7-01-what comes later", TRACE),
        (f"{TRACEPARENT}-what comes later", None),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        ("nonsense", None),
    ],
    ids=[
        "valid",
        "later version",
        "more than version 00 has",
        "version ff",
        "no trace",
        "no parent",
        "capitals",
        "nonsense",
    ],
)
def test_the_callers_trace_is_on_the_line(lines, header, trace):
    kept = lines()
    response = served(access_log=True).get("/health", headers={"traceparent": header})
    [line] = map(json.loads, kept)
    assert line.get("trace_id") == trace
    assert response.headers.get("traceparent") == (header if trace else None)
