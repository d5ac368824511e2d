"""The settings: what is read, what is refused and in which words, and that they are documented."""

import re
from pathlib import Path

import msgspec
import pytest

import config

ROOT = Path(__file__).parent.parent
FIELDS = msgspec.structs.fields(config.Config)


def _documented_default(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _description(field) -> str:
    return msgspec.inspect.type_info(field.type).extra_json_schema["description"]


def test_defaults_are_the_users():
    settings = config.load({})
    assert settings.embedding_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert (settings.batch_size, settings.max_seq_length, settings.port) == (32, 256, 8001)
    assert settings.host == "0.0.0.0"


def test_an_empty_value_counts_as_not_set():
    assert config.load({"BATCH_SIZE": " ", "DEVICE": ""}) == config.load({})


def test_values_are_converted():
    settings = config.load(
        {"BATCH_SIZE": "8", "CPU_FALLBACK": "False", "DEVICE": "cuda:0,cuda:1", "LOG_FORMAT": "JSON"}
    )
    assert settings.batch_size == 8
    assert settings.cpu_fallback is False
    assert settings.devices == ["cuda:0", "cuda:1"]
    assert settings.log_format == "json"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        pytest.param("BATCH_SIZE", "many", "Expected `int`", id="not a number"),
        pytest.param("BATCH_SIZE", "0", ">= 1", id="below the bound"),
        pytest.param("PORT", "65536", "<= 65535", id="above the bound"),
        pytest.param("PORT", "8001x", "Expected `int`", id="trailing letters"),
        pytest.param("DEVICE", "gpu", "cuda:N", id="unknown device"),
        pytest.param("DEVICE", "auto,cpu", "Expected", id="auto in a list is not alone"),
        pytest.param("DTYPE", "fp8", "float16", id="unknown choice"),
        pytest.param("CPU_FALLBACK", "maybe", "Expected `bool`", id="not a boolean"),
        pytest.param("REQUEST_TIMEOUT_SECONDS", "nan", "> 0", id="not a time"),
    ],
)
def test_a_bad_value_is_one_line_with_name_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(config.ConfigError) as caught:
        config.load({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is not allowed")
    assert allowed in message
    assert "\n" not in message


def test_the_environment_wins_over_the_env_file(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ENV_FILE", tmp_path / ".env")
    (tmp_path / ".env").write_text("BATCH_SIZE=7\nMAX_SEQ_LENGTH=99\n")
    monkeypatch.setenv("MAX_SEQ_LENGTH", "128")
    monkeypatch.setenv("BATCH_SIZE", "1")
    monkeypatch.delenv("BATCH_SIZE")
    settings = config.load()
    assert (settings.batch_size, settings.max_seq_length) == (7, 128)


def test_env_example_has_every_setting_with_its_default_and_sentence():
    expected = "".join(
        f"\n# {_description(field)}\n#{field.name.upper()}={_documented_default(field.default)}\n"
        for field in FIELDS
    )
    assert (ROOT / ".env.example").read_text().endswith(expected)


def test_the_readme_table_has_every_setting_with_its_default_and_sentence():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)? ?\| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert rows == [
        (field.name.upper(), _documented_default(field.default), _description(field)) for field in FIELDS
    ]


def test_every_choice_has_a_sentence_that_ends():
    assert all(_description(field).endswith(".") for field in FIELDS)
