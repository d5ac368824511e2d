"""The settings of Text Embeddings Inference, as variables and as options of `serve`."""

import pytest

from embedding_service.errors import ConfigError
from embedding_service.server import cli
from embedding_service.settings import environment

TEI = {
    "MODEL_ID": ("BAAI/bge-small-en", "embedding_model", "BAAI/bge-small-en"),
    "REVISION": ("main", "model_revision", "main"),
    "MAX_CLIENT_BATCH_SIZE": ("7", "max_texts_per_request", 7),
    "AUTO_TRUNCATE": ("False", "default_overflow", "error"),
    "DEFAULT_PROMPT": ("query: ", "prompts", {"default": "query: "}),
    "API_KEY": ("secret", "api_keys", "secret"),
    "PAYLOAD_LIMIT": ("2000000", "max_body_bytes", 2_000_000),
    "JSON_OUTPUT": ("true", "log_format", "json"),
    "CORS_ALLOW_ORIGIN": ("https://example.com", "cors_origins", "https://example.com"),
    "MAX_CONCURRENT_REQUESTS": ("9", "max_concurrent_requests", 9),
    "SERVED_MODEL_NAME": ("mine", "served_model_name", "mine"),
    "DTYPE": ("float16", "dtype", "float16"),
}
SAME = {"MAX_CONCURRENT_REQUESTS", "SERVED_MODEL_NAME", "DTYPE"}


def check(found: environment.Environment) -> None:
    for name, (_, ours, wanted) in TEI.items():
        assert getattr(found.settings, ours) == wanted, name
        assert any(line.startswith(f"{name} ") for line in found.warnings) == (name not in SAME)
    assert found.settings.default_prompt_name == "default"


def test_variables_count_beside_model_id():
    variables = {name: value for name, (value, *_) in TEI.items()}
    check(environment.read(variables))
    without = environment.read({name: variables[name] for name in ("REVISION", "API_KEY", "AUTO_TRUNCATE")})
    assert without.settings == environment.read({}).settings


def test_options_of_serve_count(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda _settings: None)
    monkeypatch.setattr(environment, "_current", None)
    for name in (*TEI, "EMBEDDING_MODEL"):
        monkeypatch.delenv(name, raising=False)
    options = [
        part for name, (value, *_) in TEI.items() for part in (f"--{name.lower().replace('_', '-')}", value)
    ]
    assert cli.serve([*options, "--hostname", "127.0.0.1"]) == 0
    check(environment.current())
    assert environment.current().settings.host == "127.0.0.1"


def test_this_services_settings_win():
    variables = {"MODEL_ID": "theirs", "EMBEDDING_MODEL": "ours", "JSON_OUTPUT": "true"}
    found = environment.read(variables)
    assert (found.settings.embedding_model, found.settings.log_format) == ("ours", "json")


def test_the_collector_is_told_to_opentelemetry():
    found = environment.read({"MODEL_ID": "x", "OTLP_ENDPOINT": "http://collector:4318"})
    assert found.exports == {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert found.sends_traces


def test_what_has_no_effect_is_said():
    [told] = environment.read({"MODEL_ID": "x", "EMBEDDING_MODEL": "x", "PROMETHEUS_PORT": "9000"}).warnings
    assert told.startswith("PROMETHEUS_PORT") and "/metrics" in told


@pytest.mark.parametrize(("name", "value"), [("POOLING", "cls"), ("AUTO_TRUNCATE", "maybe")])
def test_what_would_change_vectors_or_makes_no_sense_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}='{value}' is not"):
        environment.read({"MODEL_ID": "x", name: value})
