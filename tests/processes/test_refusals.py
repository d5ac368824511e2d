"""Errors that are found before the service listens: one line, exit code 78, no open port."""

import contextlib
import json
import socket
import sys
from pathlib import Path

import pytest

from embedding_service.errors import StartupError
from embedding_service.inference import source
from embedding_service.server import preflight
from embedding_service.settings.config import Config
from tests.service import ROOT, free_port, wait_until

GUNICORN = str(Path(sys.executable).with_name("gunicorn"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param({"BATCH_SIZE": "none"}, "BATCH_SIZE='none' is not allowed", id="a bad value"),
        pytest.param({"EMBEDDING_MODEL": "./nowhere"}, "there is no such folder", id="no folder"),
        pytest.param({"EMBEDDING_MODEL": "tests"}, "a folder without modules.json", id="not a model"),
        pytest.param({"EMBEDDING_MODEL": "what is this"}, "neither a folder nor a model", id="not a name"),
        pytest.param({"DEVICE": "cuda", "CPU_FALLBACK": "false"}, "CPU_FALLBACK=false", id="no CUDA"),
        pytest.param({"API_KEYS_FILE": "/nowhere"}, "API_KEYS_FILE='/nowhere' cannot be read", id="no keys"),
        pytest.param({"LOG_FILE": "/nowhere/log"}, "LOG_FILE='/nowhere/log' cannot be written", id="no log"),
        pytest.param({"HOST": "nowhere.invalid"}, "HOST='nowhere.invalid' cannot be", id="an unknown name"),
        pytest.param({"HOST": "x86_64-conda-linux-gnu"}, "conda sets HOST", id="conda's platform"),
        pytest.param({"INT8_RANGES": "/nowhere"}, "INT8_RANGES='/nowhere' cannot be read", id="no ranges"),
        pytest.param({"HOST": "192.0.2.1"}, "HOST='192.0.2.1' is not an address", id="another's address"),
        pytest.param({"HOST": "unix:/run/x.sock"}, "HOST='unix:/run/x.sock' is not allowed", id="unix"),
        pytest.param({"HOST": "*"}, "0.0.0.0 for every address", id="a star"),
        pytest.param({"HOST": "*", "LOG_FORMAT": "json"}, "0.0.0.0 for every address", id="in JSON"),
    ],
)
def test_refused_before_it_listens(start, settings, words):
    if settings.get("DEVICE"):
        settings = settings | {"CUDA_VISIBLE_DEVICES": ""}
    service = start(**settings)
    assert service.process.wait(120) == 78
    lines = service.log().splitlines()
    assert words in lines[-1]
    assert "Listening" not in service.log()
    assert "Traceback" not in service.log()
    if "LOG_FORMAT" in settings:
        assert [json.loads(line)["time"][-1] for line in lines] == ["Z"] * len(lines)


@pytest.mark.parametrize(
    "command", [None, [GUNICORN, "-b", "127.0.0.1:{port}", "app:app"]], ids=["app.py", "gunicorn"]
)
def test_a_port_in_use_gets_one_line_at_once(start, command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if command:
            command = [part.replace("{port}", str(port)) for part in command]
        service = start(command, PORT=str(port))
        assert service.process.wait(120) == 78
    assert service.log().splitlines()[-1].startswith(f"PORT={port} is in use at 127.0.0.1")
    assert "ERROR" not in service.log()


def test_a_port_whose_connections_are_still_closing_is_free():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()
    client.close()
    preflight.check_address("127.0.0.1", port)


def test_int8_without_its_package(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == "nncf" else name)
    with pytest.raises(StartupError, match="DTYPE=int8 needs nncf"):
        preflight.check_model(Config(embedding_model=source.DEFAULT_MODEL, dtype="int8"))


def test_an_error_of_the_model_process_is_the_last_line(start, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    service = start(EMBEDDING_MODEL=str(tmp_path))
    assert service.process.wait(120) == 78
    assert f"The model in {tmp_path} cannot be loaded" in service.log().splitlines()[-1]


def test_a_unix_socket_by_gunicorns_own_option(start_without_model, tmp_path):
    path = tmp_path / "embedding.sock"
    start_without_model([GUNICORN, "-b", f"unix:{path}", "app:app"])

    def answer() -> bytes:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(path))
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return client.recv(1000)
        return b""

    assert wait_until(answer, "an answer").startswith(b"HTTP/1.1 200")


def test_a_startup_error_has_the_log_format_of_the_env_file(start, tmp_path):
    (tmp_path / ".env").write_text("LOG_FORMAT=json\nBATCH_SIZE=none\n")
    service = start([sys.executable, str(ROOT / "app.py")], cwd=tmp_path)
    assert service.process.wait(120) == 78
    assert json.loads(service.log())["message"].startswith("BATCH_SIZE='none' is not allowed")


def test_an_invalid_env_file_is_refused_in_the_log_format_of_the_environment(start, tmp_path):
    (tmp_path / ".env").write_text("BATCH_SIZE\n")
    service = start([sys.executable, str(ROOT / "app.py")], cwd=tmp_path, LOG_FORMAT="json")
    assert service.process.wait(120) == 78
    assert json.loads(service.log())["message"].endswith("BATCH_SIZE has no value; write BATCH_SIZE=value")


LAUNCH = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "app.py"])
"""


def test_a_socket_from_systemd_is_not_a_port_in_use(start_without_model):
    service = start_without_model(
        [sys.executable, "-c", LAUNCH.replace("{", "{{").replace("}", "}}"), "{port}"]
    )
    assert service.wait_ready().post("/embed", {"texts": "hello"}).ok


def test_a_default_prompt_that_the_models_folder_does_not_have(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    for name, prompts in (("query", {}), ("mine", {"mine": "m: "}), (None, {})):
        preflight.check_model(
            Config(embedding_model=str(tmp_path), default_prompt_name=name, prompts=prompts)
        )
    with pytest.raises(StartupError, match="DEFAULT_PROMPT_NAME='passage' is not a prompt; there are: query"):
        preflight.check_model(Config(embedding_model=str(tmp_path), default_prompt_name="passage"))
