"""Loading and converting a model starts no process and contacts no other host."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
import multiprocessing.process, os, socket, sys

tried = []
multiprocessing.process.BaseProcess.start = lambda self: tried.append("a process")
socket.getaddrinfo = lambda *arguments, **_: tried.append(arguments)
os.register_at_fork(before=lambda: tried.append("a fork"))

from embedding_service.inference.loading import load
from embedding_service.settings.config import Config

model = load(Config(embedding_model=sys.argv[1], device="cpu", backend="openvino", cache_folder=""))
assert model.info.backend == "openvino"
assert not tried, tried
"""


def test_openvino_reports_nothing(tiny, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny("bert"))],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "intel").exists()
