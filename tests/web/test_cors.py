"""Pages from other origins are allowed only if CORS_ORIGINS names them."""

import pytest

from embedding_service.settings import config
from embedding_service.settings.config import Config
from embedding_service.web.factory import create_app
from tests.fakes import FakeEngine

HERE, OTHER = "https://example.com", "https://other.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}


def client(origins: str, **settings):
    return create_app(FakeEngine(), Config(cors_origins=origins, **settings)).test_client()


def cors_of(response) -> dict[str, str]:
    return {name: value for name, value in response.headers if name.startswith("Access-Control-Allow")}


def test_by_default_no_origin_is_allowed():
    answer = client("").post("/embed", json={"texts": "a"}, headers={"Origin": HERE})
    assert (cors_of(answer), answer.headers.get("Vary")) == ({}, None)
    assert cors_of(client("").options("/embed", headers={"Origin": HERE} | PREFLIGHT)) == {}


@pytest.mark.parametrize("origins", [HERE, f"http://localhost:3000, {HERE}/"])
def test_a_named_origin_may_read_answers_and_errors(origins):
    for body, status in (({"texts": "a"}, 200), ({"texts": []}, 400)):
        answer = client(origins).post("/embed", json=body, headers={"Origin": HERE})
        assert answer.status_code == status
        assert cors_of(answer) == {"Access-Control-Allow-Origin": HERE}
        assert answer.headers["Vary"] == "Origin"
        assert "X-Request-ID" in answer.headers["Access-Control-Expose-Headers"]


def test_another_origin_gets_no_permission():
    served = client(HERE)
    answer = served.post("/embed", json={"texts": "a"}, headers={"Origin": OTHER})
    assert (cors_of(answer), answer.headers["Vary"]) == ({}, "Origin")
    assert cors_of(served.options("/embed", headers={"Origin": OTHER} | PREFLIGHT)) == {}


def test_a_preflight_needs_no_key():
    answer = client(HERE, api_keys="secret").options("/embed", headers={"Origin": HERE} | PREFLIGHT)
    assert (answer.status_code, answer.data) == (204, b"")
    assert cors_of(answer) == {
        "Access-Control-Allow-Origin": HERE,
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": "Authorization, *",
    }


def test_options_without_a_preflight_is_answered_as_usual():
    answer = client(HERE, api_keys="secret").options("/embed", headers={"Origin": HERE})
    assert answer.status_code == 401


def test_a_star_allows_every_origin():
    answer = client("*").post("/embed", json={"texts": "a"}, headers={"Origin": OTHER})
    assert cors_of(answer) == {"Access-Control-Allow-Origin": "*"}
    assert "Vary" not in answer.headers


@pytest.mark.parametrize(
    ("setting", "allowed", "refused"),
    [
        ("http://localhost:*", ["http://localhost", "http://localhost:5173"], ["http://localhost.example"]),
        ("https://*.example.com", ["https://a.example.com", "https://b.a.example.com"], [HERE, "null"]),
        ("https://*.example.com", [], ["https://evil.com/.example.com", "https://example.com.evil.com"]),
        ("https://Example.com", [HERE], ["http://example.com", "https://exampleXcom"]),
        ("https://example.com:443", [HERE], ["https://example.com:8443"]),
        ("http://example.com:80/", ["http://example.com"], [HERE]),
        ("app://obsidian.md, null", ["app://obsidian.md", "null"], ["app://other"]),
        ("chrome-extension://abcdef", ["chrome-extension://abcdef"], ["chrome-extension://abcdeg"]),
        ("file://", ["file://"], ["null"]),
        ("http://[::1]:3000", ["http://[::1]:3000"], ["http://[::1]"]),
    ],
)
def test_origins_are_matched_as_browsers_send_them(setting, allowed, refused):
    served = client(config.load({"CORS_ORIGINS": setting}).cors_origins)
    for origin in allowed:
        assert cors_of(served.get("/health", headers={"Origin": origin})) == {
            "Access-Control-Allow-Origin": origin
        }
    for origin in refused:
        assert cors_of(served.get("/health", headers={"Origin": origin})) == {}
