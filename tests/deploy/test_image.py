"""The image, really built, and run as a non-root user with a read-only root."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.image import Builder, Container, require_root
from tests.service import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_dockerfile_names_no_other_host() -> None:
    assert re.findall(r"https?://([^:/{]+)", DOCKERFILE) == ["127.0.0.1"]
    assert DOCKERFILE.rstrip().endswith("CMD []")


BOTH = "--bind 0.0.0.0:8001 --bind 0.0.0.0:80"
PRINTER = """#!/bin/sh
[ "$1" != -c ] || exit "${PORT_80_IS_TAKEN:-0}"
printf '%s|' "$GUNICORN_CMD_ARGS" "$@"
"""


@pytest.mark.parametrize(
    ("variables", "arguments", "expected"),
    [
        ({}, [], ["", "app.py"]),
        ({"MODEL_ID": "m"}, [], [BOTH, "app.py"]),
        ({}, ["--model-id", "m"], [BOTH, "app.py", "--model-id", "m"]),
        (
            {"HOST": "127.0.0.1"},
            ["--model-id=m"],
            [BOTH.replace("0.0.0.0", "127.0.0.1"), "app.py", "--model-id=m"],
        ),
        ({"PORT_80_IS_TAKEN": "1", "MODEL_ID": "m"}, [], ["", "app.py"]),
        ({"MODEL_ID": "m", "PORT": "8080"}, [], ["", "app.py"]),
        ({"MODEL_ID": "m", "AIP_HTTP_PORT": "8080"}, [], ["", "app.py"]),
        ({"MODEL_ID": "m", "GUNICORN_CMD_ARGS": "--bind :90"}, [], ["--bind :90", "app.py"]),
        ({"MODEL_ID": "m"}, ["--port", "8080"], ["", "app.py", "--port", "8080"]),
        ({"MODEL_ID": "m"}, ["--hostname", "127.0.0.1"], ["", "app.py", "--hostname", "127.0.0.1"]),
        ({"MODEL_ID": "m"}, ["python", "two words"], ["", "two words"]),
    ],
)
def test_the_port_of_text_embeddings_inference_is_open_for_its_compose_files(
    tmp_path, variables, arguments, expected
) -> None:
    (tmp_path / "python").write_text(PRINTER)
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["sh", "deploy/entrypoint.sh", *arguments],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("|")[:-1] == expected


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    require_root()
    folder = tmp_path_factory.mktemp("image")
    builder = Builder(folder)
    builder.make_base()
    builder.build()
    yield builder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def root(builder: Builder) -> Path:
    return builder.mount()


@pytest.fixture(scope="module")
def container(builder: Builder, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    options = ("--max-client-batch-size", "64")  # of Text Embeddings Inference's image
    container = Container(tmp_path_factory.mktemp("container"), root, builder.configuration(), *options)
    try:
        yield container.wait_ready()
    finally:
        if container.process.poll() is None:
            container.stop()


@pytest.mark.deploy
class TestImage:
    def test_declares_user_command_healthcheck_and_labels(self, builder: Builder) -> None:
        image = builder.configuration()
        assert image["User"] == "10001:10001"
        assert image["Entrypoint"] == ["sh", "/app/deploy/entrypoint.sh"]
        assert not image["Cmd"]
        assert image["Healthcheck"]["Test"][0] == "CMD"
        assert list(image["ExposedPorts"]) == ["8001/tcp"]
        labels = image["Labels"]
        assert {"title", "description", "licenses", "version", "revision"} <= {
            name.removeprefix("org.opencontainers.image.") for name in labels
        }

    def test_is_as_large_as_documented(self, builder: Builder) -> None:
        [image] = json.loads(builder.buildah("images", "--json", "localhost/embedding-service"))
        print(f"the image: {image['size']}")
        size, unit = image["size"].split()
        assert unit == "GB" and float(size) < 2.2, "explained in docs/deployment.md"

    def test_has_no_compiler_no_pip_and_nothing_of_the_repository_but_the_service(self, root: Path) -> None:
        programs = {
            path.name for folder in ("bin", "usr/bin", "opt/venv/bin") for path in (root / folder).iterdir()
        }
        assert not {
            name for name in programs if re.fullmatch(r"(.*-)?(gcc|cc|g\+\+|ld|make|pip)[0-9.-]*", name)
        }
        inside = {path.name for path in (root / "app").iterdir()} - {"__pycache__", "LICENSE"}
        assert inside == {"app.py", "config.py", "gunicorn.conf.py", "embedding_service", "deploy"}

    def test_the_user_can_write_only_to_the_folders_of_models(self, root: Path) -> None:
        """To /models, and to CACHE_FOLDER, which keeps what other models than the built-in one prepare."""
        prepared = root / "opt" / "prepared"
        others = [path for folder in ("app", "opt") for path in (root / folder).rglob("*")]
        others = [path for path in others if path != prepared and prepared not in path.parents]
        assert {path.stat().st_uid for path in others} == {0}
        assert {path.stat().st_uid for path in (root / "models", prepared)} == {10001}
        assert not list((root / "models").iterdir())

    def test_serves_as_non_root_on_a_read_only_root(self, container: Container, oracle) -> None:
        response = container.post("/embed", {"texts": ["one", "two"]})
        assert response.status_code == 200, container.log()
        assert container.post("/embed", {"texts": ["one"] * 65}).status_code == 413
        wanted = oracle.encode(["one", "two"], normalize_embeddings=True)
        assert abs(wanted - response.json()["embeddings"]).max() < 1e-5
        for process in container.first_process().children(recursive=True):
            assert process.uids().real == process.uids().effective == 10001
        assert container.execute("touch", "/app/here").stderr.endswith("Read-only file system\n")
        assert container.execute("touch", "/models/here").stderr.endswith("Read-only file system\n")
        status = Path(f"/proc/{container.first_process().pid}/status").read_text()
        assert re.search(r"^CapEff:\s0+$", status, re.M)
        assert re.search(r"^NSpid:\s\d+\s1$", status, re.M), "the command is process 1"

    def test_healthcheck_reports_health(self, builder: Builder, container: Container) -> None:
        check = builder.configuration()["Healthcheck"]["Test"][1:]
        assert container.execute(*check).returncode == 0
        sick = [part.replace("/health", "/nowhere") for part in check]
        assert container.execute(*sick).returncode == 1

    def test_prints_no_warning(self, container: Container) -> None:
        log = [line for line in container.log().splitlines() if "Text Embeddings Inference" not in line]
        assert not re.search(r"WARN|ERROR|CRITICAL|Warning|Traceback", "".join(log)), log

    def test_stops_at_once_and_leaves_nothing(self, container: Container) -> None:
        processes = container.processes()
        assert container.stop() == 0
        assert not [process for process in processes if psutil.pid_exists(process.pid)]
