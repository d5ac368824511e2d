"""What README and docs tell the reader to install with pip, in empty virtual environments."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from embedding_service import __version__
from tests.deploy.image import run
from tests.docs.test_blocks import BLOCKS, at
from tests.service import ROOT


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's quick start, from the tracked files; returns the environment's bin folder."""
    folder = tmp_path_factory.mktemp("install")
    clone, environment = folder / "clone", folder / "venv"
    clone.mkdir()
    run(["sh", "-euc", f"cd {ROOT}; git ls-files -z | xargs -0 cp --parents -t {clone}"])
    run([sys.executable, "-m", "venv", str(environment)])
    run(["sh", "-euc", f"cd {clone}; {environment}/bin/pip install -q --no-compile -c constraints.txt ."])
    run(["rm", "-r", str(clone)])
    return environment / "bin"


@pytest.mark.deploy
def test_serves_the_default_model_from_an_empty_folder(binaries, start, oracle, tmp_path):
    command, empty = str(binaries / "embedding-service"), tmp_path / "empty"
    empty.mkdir()
    assert run(["env", "-C", str(empty), command, "--version"]) == f"embedding-service {__version__}\n"
    assert "serve over HTTP" in run(["env", "-C", str(empty), command, "--help"])

    # With a new home, nothing comes from the cache of an earlier run.
    service = start([command, "serve", "--port", "{port}"], cwd=empty, HOME=str(tmp_path / "home"))
    vectors = service.wait_ready().post("/embed", {"texts": "hello"}).json()["embeddings"]
    assert abs(vectors[0] - oracle.encode("hello", normalize_embeddings=True)).max() < 1e-5
    assert service.stop() == 0
    assert not list(empty.iterdir())


@pytest.mark.deploy
def test_every_version_is_pinned(binaries):
    text = (ROOT / "constraints.txt").read_text()
    pins = {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)
    }
    listed = run([str(binaries / "pip"), "list", "--format=freeze"], stderr=subprocess.DEVNULL)
    found = {canonicalize_name(name): version for name, version in re.findall(r"(\S+)==([^\s+]+)", listed)}
    ours = {"embedding-service", "pip"}
    assert {name: pins.get(name) for name in found if name not in ours} == {
        name: version for name, version in found.items() if name not in ours
    }


@pytest.mark.nightly
def test_the_example_for_langchain_huggingface_runs(service, tmp_path):
    """It needs an older huggingface-hub than the service does."""
    [block] = [block for block in BLOCKS if "langchain_huggingface" in block.text]
    [install] = re.findall(r"`pip (install langchain-huggingface[^`]*)`", block.page.read_text())
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")])
    python = str(tmp_path / "venv" / "bin" / "python")
    run([python, "-m", "pip", *install.split(), "-q"])
    (tmp_path / "block.py").write_text(at(service, block.text))
    run([python, str(tmp_path / "block.py")])
