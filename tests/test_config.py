"""The settings: how they are read, the messages for invalid ones, and their documentation."""

import re
from pathlib import Path

import msgspec
import pytest

from embedding_service.settings import config, environment
from embedding_service.words import allowed

ROOT = Path(__file__).parent.parent
FIELDS = config.FIELDS


def _documented_default(field) -> str:
    value = config.default_of(field)
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _description(field) -> str:
    return field.metadata["description"]


def test_defaults_are_the_users():
    settings = config.load({})
    assert settings.embedding_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert (settings.batch_size, settings.max_seq_length, settings.port) == (32, 256, 8001)
    assert settings.host == "0.0.0.0"


def test_an_empty_value_counts_as_not_set():
    assert config.load({"BATCH_SIZE": " ", "DEVICE": ""}) == config.load({})


def test_an_old_name_counts_if_the_new_one_is_not_set():
    old = {"WEB_THREADS": "9"}
    assert config.load(old).max_concurrent_requests == 9
    assert config.load(old | {"MAX_CONCURRENT_REQUESTS": "8"}).max_concurrent_requests == 8
    assert "WEB_THREADS is now called MAX_CONCURRENT_REQUESTS" in config.warnings(old)[0]
    assert config.warnings(old | {"MAX_CONCURRENT_REQUESTS": "8"}) == []
    with pytest.raises(config.ConfigError, match="WEB_THREADS='x'"):
        config.load({"WEB_THREADS": "x"})


def test_values_are_converted():
    settings = config.load(
        {"BATCH_SIZE": "8", "CPU_FALLBACK": "False", "DEVICE": "cuda:0,cuda:1", "LOG_FORMAT": "JSON"}
    )
    assert settings.batch_size == 8
    assert settings.cpu_fallback is False
    assert settings.devices == ["cuda:0", "cuda:1"]
    assert settings.log_format == "json"


def test_prompts_are_read_as_json():
    assert config.load({"PROMPTS": '{"query": "q: ", "none": ""}'}).prompts == {"query": "q: ", "none": ""}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        pytest.param("BATCH_SIZE", "many", "a whole number from 1 to 4096", id="not a number"),
        pytest.param("BATCH_SIZE", "0", "from 1 to", id="below the bound"),
        pytest.param("PORT", "65536", "to 65535", id="above the bound"),
        pytest.param("PORT", "8001x", "a whole number", id="trailing letters"),
        pytest.param("MAX_QUEUED_TOKENS", "1", "a whole number from 1024", id="a bound on one side"),
        pytest.param("DEVICE", "gpu", "cuda:N", id="unknown device"),
        pytest.param("DEVICE", "auto,cpu", "a list such as", id="auto in a list is not alone"),
        pytest.param("DTYPE", "fp8", "auto, bfloat16, float16, float32 or int8", id="unknown choice"),
        pytest.param("CPU_FALLBACK", "maybe", "true or false", id="not a boolean"),
        pytest.param("REQUEST_TIMEOUT_SECONDS", "nan", "a number above 0 to 3600", id="not a time"),
        pytest.param("REQUEST_TIMEOUT_SECONDS", "1m", "a number above 0 to 3600", id="a unit"),
        pytest.param("HOST", "*", "0.0.0.0 for every address", id="a star"),
        pytest.param("HOST", "unix:/run/x.sock", "-b takes unix:", id="a unix socket"),
        pytest.param("HOST", "localhost:8001", "without a port", id="a host with its port"),
        pytest.param("HOST", "[::1]:8001", "without a port", id="an IPv6 address with its port"),
        pytest.param("HOST", "http://localhost", "an IPv4 or IPv6 address or a name", id="a URL"),
        pytest.param("LOG_FILE", "/tmp/l\udcf6g", "not UTF-8", id="undecodable bytes"),
        pytest.param("EMBEDDING_MODEL", "a\nPORT=1", "line breaks", id="two lines"),
        pytest.param("SLOW_REQUEST_SECONDS", "-1", "a number from 0 to 3600", id="a negative time"),
        pytest.param("PROMPTS", "query:", "a JSON object of names and texts", id="not JSON"),
        pytest.param("PROMPTS", '{"query": 1}', "a JSON object of names and texts", id="not a text"),
        pytest.param("CORS_ORIGINS", "https://a.example/path", "origins such as", id="a URL with a path"),
        pytest.param("CORS_ORIGINS", "example.com", "origins such as", id="no scheme"),
        pytest.param("CORS_ORIGINS", "*.example.com", "origins such as", id="a pattern without a scheme"),
        pytest.param("CORS_ORIGINS", "https://a*.example", "origins such as", id="a star within a label"),
        pytest.param(
            "CORS_ORIGINS", "https://bücher.example", "names in ASCII", id="a name as people read it"
        ),
        pytest.param("CORS_ORIGINS", "*, https://a.example", "origins such as", id="a star and more"),
    ],
)
def test_a_bad_value_gets_one_line_with_its_name_and_the_allowed_values(name, value, allowed):
    with pytest.raises(config.ConfigError) as caught:
        config.load({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is not allowed")
    assert allowed in message
    assert "\n" not in message
    assert "Expected" not in message


def test_a_rejected_key_is_not_shown():
    with pytest.raises(config.ConfigError) as caught:
        config.load({"API_KEYS": "secret\nword"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("LOG_LEVEL", "WARN", "warning"),
        ("DTYPE", "fp16", "float16"),
        ("DTYPE", "half", "float16"),
        ("DTYPE", "BF16", "bfloat16"),
        ("DTYPE", "fp32", "float32"),
        ("BACKEND", "PyTorch", "torch"),
        ("CPU_FALLBACK", "no", False),
        ("DEVICE", "CUDA:0, cuda:1", "cuda:0,cuda:1"),
        ("HOST", "[::1]", "::1"),
        ("HOST", "fe80::1%eth0", "fe80::1%eth0"),
        ("HOST", "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("HOST", "my-host.example.", "my-host.example."),
    ],
)
def test_names_that_other_software_uses_are_accepted(name, value, meant):
    assert getattr(config.load({name: value}), name.lower()) == meant


@pytest.fixture
def env_file(tmp_path, monkeypatch) -> Path:
    """The `.env` of the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".env"


def read() -> environment.Environment:
    return environment.read({"HOME": "/"})


def test_arguments_win_over_the_environment_and_both_over_the_env_file(env_file):
    env_file.write_text("BATCH_SIZE=7\nMAX_SEQ_LENGTH=99\nPORT=1\n")
    settings = environment.read({"MAX_SEQ_LENGTH": "128", "PORT": "2"}, PORT="3").settings
    assert (settings.batch_size, settings.max_seq_length, settings.port) == (7, 128, 3)


def test_the_env_file_is_parsed_as_dotenv_does(env_file):
    env_file.write_text(
        "\ufeff# a comment\n\nexport BATCH_SIZE = 7 # and another\nAPI_KEYS='a#b,c'\r\nHOST=\n"
        "LOG_FILE=${HOME}tmp/${NAME:-x}.log\n",
        encoding="utf-8",
    )
    settings = read().settings
    assert (settings.batch_size, settings.api_keys, settings.host) == (7, "a#b,c", "0.0.0.0")
    assert settings.log_file == "/tmp/x.log"


def test_only_variables_for_libraries_are_added_to_the_environment(env_file):
    env_file.write_text("API_KEYS=secret\nHF_TOKEN=theirs\nHOME=/other\n")
    assert read().exports == {"HF_TOKEN": "theirs"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"PORT=1\n\n\nAPI_KEYS: secret\n", "line 4: this is not NAME=value", id="a colon"),
        pytest.param(b"API_KEYS:secret\n", "line 1: 'API_KEYS:secret' is not a variable", id="no space"),
        pytest.param(b"# keys\nAPI_KEYS\n", "line 2: API_KEYS has no value", id="no value"),
        pytest.param(b"export API_KEYS\n", "line 1: API_KEYS has no value", id="export without a value"),
        pytest.param(b'PORT=1\nAPI_KEYS="secret\n', "line 2: this is not NAME=value", id="an open quote"),
        pytest.param(b"API_KEYS='a' 'b'\n", "line 1: this is not NAME=value", id="two values"),
        pytest.param(b'API_KEYS="a\nb"\n', "API_KEYS=", id="a value of two lines"),
        pytest.param(b"API_KEYS=${SECRET}\n", "API_KEYS refers to ${SECRET}, which is not", id="not set"),
        pytest.param("PORT=1\nAPI_KEYS=k".encode("utf-16"), "UTF-16", id="UTF-16"),
        pytest.param("PORT=1\nAPI_KEYS=k".encode("utf-16-le"), "UTF-16", id="UTF-16 without its mark"),
        pytest.param("PORT=1\nLOG_FILE=lög".encode("latin-1"), "line 2: the file is not UTF-8", id="Latin-1"),
    ],
)
def test_an_invalid_env_file_gets_one_line(env_file, content, words):
    env_file.write_bytes(content)
    with pytest.raises(config.ConfigError) as caught:
        _ = read().settings
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value) or "API_KEYS:secret" in str(caught.value)


def test_an_unreadable_env_file_gets_one_line(env_file):
    env_file.mkdir()
    with pytest.raises(config.ConfigError, match=r"\.env cannot be read: Is a directory"):
        read()
    env_file.rmdir()
    env_file.symlink_to("nowhere")
    with pytest.raises(config.ConfigError, match=r"\.env cannot be read: No such file"):
        read()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("WEB_CONCURENCY", "WEB_CONCURRENCY"),
        ("BATCHSIZE", "BATCH_SIZE"),
        ("batch_size", "BATCH_SIZE"),
        ("API_KEY_FILE", "API_KEYS_FILE"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("DEVICES", "DEVICE"),
    ],
)
def test_a_misspelt_setting_gets_a_suggestion(env_file, written, meant):
    env_file.write_text(f"{written}=1\nHF_TOKEN=x\nHF_HOME=/x\nTMPDIR=/x\n")
    [warning] = read().warnings
    assert f"{written} is not a setting" in warning
    assert warning.endswith(f"did you mean {meant}?")


def test_a_misspelt_setting_in_the_environment_gets_a_suggestion():
    others = {
        "PATH": "/bin",
        "HOSTNAME": "x",
        "PROMPT": "$ ",
        "API_KEY": "x",
        "PYTHONPATH": "",
        "WEB_THREADS": "1",
    }
    found = environment.read({"EMBEDING_MODEL": "x", "SUPPORTED": "1"} | others).warnings
    assert [line for line in found if "did you mean" in line] == [
        "the environment: EMBEDING_MODEL is not a setting of this service and has no effect; "
        "did you mean EMBEDDING_MODEL?"
    ]


def test_the_clients_key_alone_gets_a_warning_that_it_protects_nothing(env_file):
    env_file.write_text("API_KEY=x\n")
    assert "the service requires API_KEYS" in read().warnings[0]
    assert read().client_api_key == "x"
    env_file.write_text("API_KEY=x\nAPI_KEYS=x\n")
    assert read().warnings == ()


def test_env_example_has_every_setting_with_default_and_description():
    expected = "".join(
        f"\n# {_description(field)}\n#{field.name.upper()}={_documented_default(field)}\n" for field in FIELDS
    )
    assert (ROOT / ".env.example").read_text().endswith(expected)


def _values(field) -> str:
    """What the setting may be; nothing if any text will do."""
    words = field.metadata["allowed"] or allowed(msgspec.inspect.type_info(config.type_of(field)))
    return "" if words == "a string" else words


def test_settings_md_has_every_setting_with_default_values_and_description():
    rows = ""
    for field in FIELDS:
        default = _documented_default(field) and f"`{_documented_default(field)}`"
        rows += f"| `{field.name.upper()}` | {default} | {_values(field)} | {_description(field)} |\n"
    assert f"\n|---|---|---|---|\n{rows}\n" in (ROOT / "docs" / "settings.md").read_text()


def test_the_settings_that_the_readme_shows_exist():
    shown = re.findall(r"`([A-Z0-9_]{4,})`", (ROOT / "README.md").read_text().partition("## Settings")[2])
    assert {name.lower() for name in shown if name != "TORCH_INDEX"} <= {field.name for field in FIELDS}


def test_every_description_ends_with_a_full_stop():
    assert all(_description(field).endswith(".") for field in FIELDS)
