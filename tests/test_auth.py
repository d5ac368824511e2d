"""Keys: which routes require one, how it is sent and rotated, and that it is never logged."""

import base64
import hmac
import sys
from pathlib import Path

import numpy as np
import pytest
import requests

import config
from embedding_service.engine import Embeddings, Status, Timings
from embedding_service.errors import StartupError
from embedding_service.settings.config import Config
from embedding_service.web import keys
from embedding_service.web.factory import create_app
from embedding_service.web.keys import KeyRing
from tests.fakes import INFO
from tests.service import wait_until


def basic(login: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}


OURS, OTHERS, FILED, ROTATED = (
    "key-of-ours-1",
    "schlüssel-der-anderen",
    "key-from-a-file",
    "key-after-rotation",
)
BODY = {"texts": "hello"}


class OneVector:
    """An engine without a model, for checks that come before it."""

    def call(self, request):
        vectors = np.ones((len(request.texts), 3), np.float32)
        return Embeddings(vectors=vectors, tokens=3, truncated=[], timings=Timings())

    def status(self):
        return Status(state="healthy", info=INFO)

    def must_restart(self):
        return False

    def close(self):
        pass


def client_for(**settings):
    return create_app(OneVector(), Config(**settings)).test_client()


@pytest.fixture(scope="module")
def client():
    return client_for(api_keys=f"{OURS}, {OTHERS}")


SENT = {
    "bearer": {"Authorization": f"Bearer {OURS}"},
    "scheme in lower case": {"Authorization": f"bearer {OURS}"},
    "second key": {"X-API-Key": OTHERS.encode().decode("latin-1")},
    "x-api-key": {"X-API-Key": OURS},
    "Azure's api-key": {"api-key": OURS},
    "password of basic": basic(f"any:{OURS}"),
    "password of basic without a name": basic(f":{OTHERS}"),
    "x-api-key beside the proxy's own login": {"X-API-Key": OURS, "Authorization": "Basic dXNlcjpwYXNz"},
}
REFUSED = {
    "nothing": {},
    "wrong": {"Authorization": "Bearer wrong"},
    "empty bearer": {"Authorization": "Bearer "},
    "empty x-api-key": {"X-API-Key": ""},
    "no scheme": {"Authorization": OURS},
    "basic that is not encoded": {"Authorization": f"Basic {OURS}"},
    "the key as the name of basic": basic(f"{OURS}:"),
    "basic without a colon": basic(OURS),
    "a wrong password of basic": basic("any:wrong"),
    "the beginning of a key": {"X-API-Key": OURS[:-1]},
    "longer than a key": {"X-API-Key": OURS + "x"},
    "the whole list": {"X-API-Key": f"{OURS}, {OTHERS}"},
    "a very long one": {"X-API-Key": "k" * 100_000},
}


@pytest.mark.parametrize("headers", SENT.values(), ids=SENT.keys())
def test_every_way_to_send_a_key_works(client, headers):
    assert client.post("/embed", json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED.keys())
def test_a_request_without_a_valid_key_gets_a_401_that_says_how_to_send_one(client, headers):
    answer = client.post("/embed", json=BODY, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="embedding-service"'
    assert answer.json["error_type"] == "unauthorized"
    assert "X-API-Key" in answer.json["error"]
    assert answer.json["request_id"] == answer.headers["X-Request-ID"]
    assert OURS not in answer.text


AS_TEI = ("/", "/v1", "/similarity", "/tokenize", "/embed_all", "/invocations", "/predict")
SHAPES = {
    "native": ("/embed", lambda body: body["error"] if body["error_type"] == "unauthorized" else None),
    "openai": ("/v1/embeddings", lambda body: body["error"]["message"]),
    **{
        path: (path, lambda body: body["error"] if body["error_type"] == "Unauthorized" else None)
        for path in AS_TEI
    },
    "cohere 1": ("/v1/embed", lambda body: body["message"] if body.keys() == {"id", "message"} else None),
    "cohere 2": ("/v2/embed", lambda body: body["message"] if body.keys() == {"id", "message"} else None),
    "ollama": ("/api/embed", lambda body: body["error"]),
    "weaviate": ("/vectors", lambda body: body["error"]),
}


@pytest.mark.parametrize(("path", "message"), SHAPES.values(), ids=SHAPES.keys())
def test_each_protocol_has_its_own_error_for_a_missing_key(client, path, message):
    answer = client.post(path, json={})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert "a valid key is required" in message(answer.json)


def is_meant_to_be_public(rule, method):
    health = {"/health", "/health/live", "/health/ready", "/ping", "/.well-known/live", "/.well-known/ready"}
    pages = {"/", "/docs", "/docs/<name>"}
    return method == "GET" and (rule in health | pages or rule.startswith("/static/"))


def test_every_route_but_health_and_the_pages_requires_a_key(client):
    routes = [
        (rule.rule, method)
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    ]
    asked = {
        route
        for route in routes
        if client.open(route[0].replace("<", "").replace(">", ""), method=route[1]).status_code == 401
    }
    assert asked == {route for route in routes if not is_meant_to_be_public(*route)}
    assert ("/embed", "POST") in asked
    assert ("/metrics", "GET") in asked
    assert asked.isdisjoint({("/health", "GET"), ("/ping", "GET")})


def test_a_caller_without_a_key_cannot_tell_which_routes_exist(client):
    assert client.get("/nothing/here").status_code == 401
    assert client.get("/embed").status_code == 401
    assert client.get("/nothing/here", headers=SENT["bearer"]).status_code == 404


def test_a_path_that_merely_resembles_health_requires_a_key(client):
    for path in (
        "//health",
        "/health/../embed",
        "/embed?x=/health",
        "/health%2f..%2fembed",
        "/static/../embed",
    ):
        assert client.post(path, json=BODY).status_code == 401, path


def test_no_key_is_required_if_none_is_set():
    assert client_for().post("/embed", json=BODY).status_code == 200


def test_a_key_is_compared_with_every_known_key(monkeypatch):
    compared = []
    real = hmac.compare_digest

    def compare(a, b):
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr("embedding_service.web.keys.hmac.compare_digest", compare)
    ring = KeyRing("one,two,three", None)
    for sent in (b"one", b"three", b"nothing at all", b""):
        compared.clear()
        ring.holds(sent)
        assert compared == [(32, 32)] * 3


@pytest.fixture
def at_once(monkeypatch):
    """The key file is looked at for every request, and waited for."""
    monkeypatch.setattr(keys, "REREAD_SECONDS", 0.0)
    monkeypatch.setattr(keys, "PATIENCE_SECONDS", 30.0)


def replace(file: Path, *keys: str) -> None:
    new = file.with_suffix(".new")
    new.write_text("".join(f"{key}\n" for key in keys))
    new.replace(file)


def test_the_key_file_is_reread_when_it_changes(tmp_path, at_once):
    file = tmp_path / "keys"
    file.write_text(f"# a comment\n\n  {FILED}  \r\nsecond\n")
    ring = KeyRing(OURS, str(file))
    assert [ring.holds(key.encode()) for key in (OURS, FILED, "second", "# a comment", "")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    replace(file, ROTATED)
    assert [ring.holds(key.encode()) for key in (OURS, FILED, ROTATED)] == [True, False, True]


def test_an_emptied_key_file_lets_nobody_in(tmp_path, at_once):
    file = tmp_path / "keys"
    file.write_text(f"{FILED}\n")
    client = client_for(api_keys_file=str(file))
    assert client.get("/info", headers={"X-API-Key": FILED}).status_code != 401
    replace(file)
    assert client.get("/info", headers={"X-API-Key": FILED}).status_code == 401
    assert client.get("/info").status_code == 401


def test_an_unreadable_key_file_keeps_its_last_keys_and_is_logged_once(tmp_path, caplog, at_once):
    file = tmp_path / "keys"
    file.write_text(f"{FILED}\n")
    ring = KeyRing(None, str(file))
    assert ring.holds(FILED.encode())
    file.unlink()
    assert [ring.holds(FILED.encode()) for _ in range(3)] == [True] * 3
    assert sum("cannot be read" in line for line in caplog.messages) == 1
    replace(file, ROTATED)
    assert [ring.holds(key.encode()) for key in (FILED, ROTATED)] == [False, True]
    assert FILED not in caplog.text


BAD_SOURCES = {
    "no key in the list": (" , ,", None, "contain no key"),
    "no such file": (None, "missing", "No such file"),
    "empty file": (None, "empty", "contain no key"),
    "not text": (None, "binary", "not UTF-8"),
}


@pytest.mark.parametrize(("listed", "name", "reason"), BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
def test_configured_sources_without_a_key_stop_the_start(tmp_path, listed, name, reason):
    (tmp_path / "empty").write_text("\n# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StartupError, match=reason):
        KeyRing(listed, name and str(tmp_path / name)).check()


@pytest.mark.parametrize(
    ("host", "is_open"),
    [
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.7", True),
        ("some.name", True),
        ("127.0.0.1", False),
        ("127.1.2.3", False),
        ("::1", False),
        ("localhost", False),
    ],
)
def test_which_addresses_are_open(host, is_open):
    assert config.Config().is_open_at(host) == is_open
    assert not config.Config(api_keys="key").is_open_at(host)
    assert not config.Config(api_keys_file="file").is_open_at(host)


def test_the_real_service_requires_keys_rotates_them_and_never_logs_them(start_without_model, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{FILED}\n")
    running = start_without_model(
        API_KEYS=OURS, API_KEYS_FILE=str(file), LOG_LEVEL="debug", WEB_CONCURRENCY="2"
    ).wait_ready()

    def status(key: str, path: str = "/embed") -> int:
        return running.post(path, BODY, headers={"Authorization": f"Bearer {key}"}).status_code

    assert [status(key) for key in (OURS, FILED, ROTATED)] == [200, 200, 401]
    assert [status(key, "/nothing") for key in (OURS, ROTATED)] == [404, 401]
    assert requests.get(f"{running.url}/metrics", timeout=60).status_code == 401
    replace(file, ROTATED)
    # New connections, so that both workers get requests.
    wait_until(lambda: {status(ROTATED) for _ in range(20)} == {200}, "the new key in both workers")
    wait_until(lambda: {status(FILED) for _ in range(20)} == {401}, "the end of the old key")
    address = running.url.replace("//", f"//any:{OURS}@")
    assert requests.post(f"{address}/embed", json=BODY, timeout=60).status_code == 200
    assert status(OURS) == 200

    with requests.Session() as session:  # a rejected body must not be read as the next request
        for _ in range(3):
            refused = session.post(f"{running.url}/embed", json={"texts": ["x" * 5000] * 100}, timeout=60)
            assert refused.status_code == 401
        header = {"X-API-Key": OURS}
        assert session.post(f"{running.url}/embed", json=BODY, headers=header, timeout=60).status_code == 200
        scraped = session.get(f"{running.url}/metrics", headers=header, timeout=60).text

    command_lines = " ".join(" ".join(process.cmdline()) for process in running.processes())
    for key in (OURS, FILED, ROTATED, base64.b64encode(f"any:{OURS}".encode()).decode()):
        for place in (running.log(), scraped, command_lines):
            assert key not in place
    assert "no key is required" not in running.log()


def test_a_warning_is_logged_if_the_network_can_use_the_service_without_a_key(start_without_model):
    running = start_without_model(HOST="0.0.0.0")
    wait_until(lambda: "Anyone who can reach 0.0.0.0 can use this service" in running.log(), "the warning")
    assert running.log().count("Anyone who can reach") == 1


def test_no_warning_is_logged_if_only_this_machine_can(start_without_model):
    command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", "127.0.0.1:{port}", "app:app"]
    running = start_without_model(command, HOST="0.0.0.0")
    wait_until(running.health, "an answer")
    assert "Anyone who can reach" not in running.log()
