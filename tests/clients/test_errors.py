"""Every error of a fake engine has the format that the clients of each protocol expect."""

from contextlib import contextmanager

import httpx2
import jsonschema_rs
import openai
import pytest

from embedding_service import errors
from embedding_service.engine import Status
from embedding_service.settings.config import Config
from embedding_service.web.factory import create_app
from embedding_service.web.openapi import document
from tests.fakes import BODIES, FakeEngine

KINDS = [kind for kind in errors.BY_NAME.values() if kind is not errors.NotFound]

# They use the statuses of Text Embeddings Inference.
AS_TEI = (
    *("/vertex", "/decode"),
    *("/", "/v1", "/tokenize", "/similarity", "/embed_all", "/invocations", "/predict", "/models/{name}"),
    *("/pipeline/feature-extraction/{name}", "/pipeline/sentence-similarity/{name}"),
)


@pytest.fixture
def engine():
    engine = FakeEngine()
    engine.error = RuntimeError("secret detail")
    return engine


@pytest.fixture
def app(engine):
    return create_app(engine, Config())


def validator(app, path: str, status: int) -> jsonschema_rs.Validator:
    described = document(app)
    schema = described["paths"][path]["post"]["responses"][str(status)]["content"]["application/json"][
        "schema"
    ]
    return jsonschema_rs.validator_for({**schema, "components": described["components"]})


# POST routes that do not use the engine.
DESCRIBING = {"/api/show", "/api/pull", "/api/generate", "/v1/check-api-key"}


def test_every_embedding_route_is_in_the_table(app):
    documented = {path for path, methods in document(app)["paths"].items() if "post" in methods}
    assert documented == set(BODIES) | DESCRIBING


@pytest.mark.parametrize(
    ("kind", "path"),
    # Only an answer with vectors is refused because of its model.
    [
        (kind, path)
        for kind in KINDS
        for path in BODIES
        if kind is not errors.FingerprintMismatch or not path.endswith(("tokenize", "/decode"))
    ],
    ids=lambda given: getattr(given, "__name__", given),
)
def test_errors_are_answered_as_documented(app, engine, path, kind):
    engine.error = kind("it failed", retry_after_seconds=1.2)
    answer = app.test_client().post(path, json=BODIES[path])
    changed = {400: 422, 500: 424} if path in AS_TEI else {}
    assert answer.status_code == changed.get(kind.status, kind.status)
    assert "it failed" in answer.text
    assert (answer.headers["Retry-After"], answer.headers["retry-after-ms"]) == ("2", "1200")
    validator(app, path, answer.status_code).validate(answer.json)


@pytest.mark.parametrize("path", BODIES)
def test_a_bug_is_a_500_without_details(app, path):
    answer = app.test_client().post(path, json=BODIES[path])
    assert answer.status_code in (424, 500)
    assert "secret" not in answer.text
    validator(app, path, answer.status_code).validate(answer.json)


def test_weaviates_probes_fail_if_the_service_cannot_serve(app, engine):
    client = app.test_client()
    assert client.get("/.well-known/ready").status_code == 204
    engine.current = Status(state="loading", reason="loading the model")
    answer = client.get("/.well-known/ready")
    assert (answer.status_code, answer.json) == (503, {"error": "loading the model"})
    assert client.get("/.well-known/live").status_code == 204
    assert client.get("/meta").json == {"error": "loading the model"}
    assert client.get("/v1/models").json["error"]["code"] == "service_unavailable"


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        (errors.Overloaded, openai.RateLimitError),
        (errors.Unavailable, openai.InternalServerError),
        (errors.DeadlineExceeded, openai.InternalServerError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_the_openai_sdk_raises_its_own_exceptions(app, engine, kind, raised):
    engine.error = kind("it failed", retry_after_seconds=0.05)
    with sdk(app) as client, pytest.raises(raised, match="it failed"):
        client.embeddings.create(input="x", model="any")


def test_the_openai_sdk_raises_its_own_exception_without_a_key():
    app = create_app(FakeEngine(), Config(api_keys="the-key"))
    with (
        sdk(app) as client,
        pytest.raises(openai.AuthenticationError, match="a valid key is required") as caught,
    ):
        client.embeddings.create(input="x", model="any")
    assert caught.value.code == "invalid_api_key"
    validator(app, "/v1/embeddings", 401).validate(caught.value.response.json())


@contextmanager
def sdk(app):
    """The official SDK, connected directly to the app."""
    with httpx2.Client(transport=httpx2.WSGITransport(app=app)) as http:
        yield openai.OpenAI(base_url="http://service/v1", api_key="x", http_client=http, max_retries=0)
