"""How a run deals with a service: keys, retries, refusals, and another model behind the same URL."""

import base64
import json

import httpx2
import numpy as np
import pytest

from embedding_service.bulk.embedders import (
    RemoteEmbedder,
    Stopped,
    retry_after_seconds,
)
from embedding_service.bulk.pipeline import Patient
from embedding_service.bulk.rows import Row
from embedding_service.errors import StartupError


class Scripted:
    """A service that answers as a test says: `answers` gets the texts and gives a response or None."""

    def __init__(self, answers=lambda _texts: None) -> None:
        self.answers = answers
        self.fingerprint = "one"
        self.requests: list[httpx2.Request] = []

    def embedder(self) -> RemoteEmbedder:
        return RemoteEmbedder("http://service", "clé", {}, httpx2.MockTransport(self._handle))

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.path == "/info":
            info = {"model_name": "m", "fingerprint": self.fingerprint, "max_client_batch_size": 100}
            return httpx2.Response(200, json=info)
        texts = json.loads(request.content)["texts"]
        response = self.answers(texts)
        if response is not None:
            return response
        vectors = [np.array([len(text), 1], np.float32) for text in texts]
        encoded = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        return httpx2.Response(200, json={"embeddings": encoded, "usage": {"truncated": []}})


def refusal(
    status: int, error: str, about: dict[str, str | int] | None = None, **headers: str
) -> httpx2.Response:
    """An error as the service writes it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, json={"error": error, "error_type": "x"} | (about or {}), headers=names)


def numbered(*texts: str) -> list[Row]:
    return [Row(number, number + 1, text) for number, text in enumerate(texts)]


def test_the_key_is_sent_and_a_wrong_one_stops_the_run_at_the_start():
    scripted = Scripted(lambda _texts: refusal(401, "missing or wrong API key"))
    with pytest.raises(StartupError, match="missing or wrong API key"):
        Patient(scripted.embedder(), 10)
    assert {dict(request.headers.raw)[b"Authorization"] for request in scripted.requests} == {
        "Bearer clé".encode()
    }


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(status, monkeypatch):
    refusals = iter([None, refusal(status, "later", Retry_After="7")])
    patient = Patient(Scripted(lambda _texts: next(refusals, None)).embedder(), 10)
    waits: list[float] = []
    monkeypatch.setattr(patient.stopping, "wait", waits.append)
    assert not patient.embed(numbered("x")).bad
    [waited] = waits
    assert 7 <= waited <= 7 * 1.25


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "3", "retry-after-ms": "120"}, 0.12),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_every_form_of_retry_after_is_read(headers, seconds):
    assert retry_after_seconds(httpx2.Headers(headers)) == seconds


@pytest.mark.parametrize("status", [400, 413, 422, 500, 504])
def test_a_single_rejected_text_is_found_and_only_its_row_is_bad(status):
    about = {"field": "texts", "index": 0, "reason": "is poison"}
    scripted = Scripted(
        lambda texts: refusal(status, "texts[0] is poison", about) if "poison" in texts else None
    )
    texts = [f"text {i}" for i in range(64)]
    texts[37] = "poison"
    chunk = Patient(scripted.embedder(), 30).embed(numbered(*texts))
    assert chunk.bad == [Row(37, 38, "poison", "the text is poison")]
    assert np.flatnonzero(np.isnan(chunk.vectors).any(axis=1)).tolist() == [37]
    assert [request.url.path for request in scripted.requests].count("/embed") < 20


def test_a_service_that_fails_completely_for_a_while_makes_no_row_bad():
    failing = iter([False] + [True] * 5)
    scripted = Scripted(lambda _texts: refusal(500, "internal") if next(failing, False) else None)
    chunk = Patient(scripted.embedder(), 120).embed(numbered("a", "b", "c"))
    assert not chunk.bad and not np.isnan(chunk.vectors).any()


def test_it_gives_up_after_the_configured_time():
    answered = iter([None])
    scripted = Scripted(lambda _texts: next(answered, refusal(503, "loading")))
    patient = Patient(scripted.embedder(), 1.5)
    with pytest.raises(Stopped, match=r"nothing was embedded in 2 s: loading"):
        patient.embed(numbered("a"))


def test_another_model_behind_the_same_url_stops_the_run():
    scripted = Scripted()
    patient = Patient(scripted.embedder(), 10)
    away = iter([refusal(503, "loading")])
    scripted.answers = lambda _texts: next(away, None)
    scripted.fingerprint = "two"
    with pytest.raises(Stopped, match="another model"):
        patient.embed(numbered("a"))


def test_the_model_of_the_start_is_pinned_and_another_one_stops_the_run():
    scripted = Scripted()
    patient = Patient(scripted.embedder(), 10)
    scripted.answers = lambda _texts: refusal(412, "the model's fingerprint is another")
    with pytest.raises(Stopped, match="fingerprint is another"):
        patient.embed(numbered("a"))
    assert [request.headers.get("x-expect-fingerprint") for request in scripted.requests] == [
        None,
        "one",
        "one",
    ]
