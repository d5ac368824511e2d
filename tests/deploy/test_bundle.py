"""`make bundle`: built here, then installed and run without a network."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, require_program

# What a user would type. The namespace ends with the script, and the service with the namespace.
ON_THE_MACHINE = """
set -eu
ip link set lo up
PYTHON="$3" "$1/install.sh" "$2"
cd "$2"
HOST=127.0.0.1 .venv/bin/python app.py 2>service.log &
trap 'kill $!; wait' EXIT
curl --silent --fail --retry 300 --retry-delay 1 --retry-all-errors http://127.0.0.1:8001/health
curl --silent --fail http://127.0.0.1:8001/embed -H 'Content-Type: application/json' \
  -d '{"texts": ["Hello world"]}' >answer.json
"""


def build(folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "bundle.build", "--output", str(folder), *options]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def on_the_machine(bundle: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--net", "sh", "-c", ON_THE_MACHINE, "sh", str(bundle), str(target)]
    command += [sys._base_executable]  # type: ignore[attr-defined]
    # pip would compile all of torch to bytecode, and the service needs a small part of it.
    environment = os.environ | {"PIP_COMPILE": "0"}
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def require_programs() -> None:
    for program, package in {"unshare": "util-linux", "ip": "iproute2", "curl": "curl"}.items():
        require_program(program, package)


def served(bundle: Path, target: Path) -> tuple[str, dict[str, Any]]:
    """The output of the installation and the start, which must succeed, and the answer to a request."""
    done = on_the_machine(bundle, target)
    log = target / "service.log"
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log.read_text() if log.exists() else ''}"
    return done.stdout, json.loads((target / "answer.json").read_text())


@pytest.mark.nightly
def test_a_bundle_installs_and_serves_without_a_network(tmp_path, oracle):
    require_programs()
    bundle = build(tmp_path / "bundle", "--weights", "float16")
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 64 << 20
    output, answer = served(bundle, tmp_path / "target")
    assert '"status":"healthy"' in output
    # float16 weights, computed in float32
    assert np.abs(answer["embeddings"] - oracle.encode(["Hello world"])).max() < 1e-3


@pytest.mark.deploy
def test_a_prepared_bundle_serves_without_torch(tmp_path, oracle):
    require_programs()
    left_out = ["torch", "transformers", "sentence-transformers"]
    bundle = build(tmp_path / "bundle", "--prepared", "--without", *left_out)
    assert not list(bundle.glob("piece-*/wheels/torch-*"))
    output, answer = served(bundle, tmp_path / "target")
    assert "torch is not installed" in output
    assert np.abs(answer["embeddings"] - oracle.encode(["Hello world"])).max() < 1e-5

    victim = next(bundle.glob("piece-*/model/vocab.txt"))
    victim.write_bytes(victim.read_bytes().replace(b"the", b"teh", 1))
    done = on_the_machine(bundle, tmp_path / "another")
    assert done.returncode != 0
    assert "vocab.txt: FAILED" in done.stdout
    assert not (tmp_path / "another").exists()


@pytest.mark.nightly
def test_a_bundle_for_another_python_version_is_complete(tmp_path):
    """pip's own resolver finds everything in the bundle except for torch."""
    bundle = build(tmp_path / "bundle", "--python", "3.12", "--without", "torch")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for path in bundle.glob("piece-*/wheels/*"):
        path.rename(wheels / path.name)
    with zipfile.ZipFile(wheels / "torch-2.13.0-py3-none-any.whl", "w") as stub:
        stub.writestr(
            "torch-2.13.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
        )
        stub.writestr("torch-2.13.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        stub.writestr("torch-2.13.0.dist-info/RECORD", "")
    requirements = tmp_path / "requirements.txt"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements.write_text("\n".join(line for line in lines if not line.startswith(("-c", "gt-all"))))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--isolated"]
    command += ["--find-links", str(wheels), "--only-binary=:all:", "--python-version", "3.12"]
    command += ["--target", str(tmp_path / "nowhere"), "--ignore-installed"]
    command += ["-r", str(requirements)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cp312" in " ".join(path.name for path in wheels.iterdir())
