"""The server of the model process, in cases that tests of the whole service do not cover."""

import subprocess
import sys

from embedding_service.engine import Status
from embedding_service.sharing import wire
from embedding_service.sharing.runtime_folder import RuntimeFolder
from tests.service import ROOT, wait_until

# A server without a model, which on request opens as many files as it can, and closes them again.
SERVER = """
import os, resource, sys
from pathlib import Path
from embedding_service.observability import logs
from embedding_service.inference import local
from embedding_service.settings.config import Config
from embedding_service.sharing.server import ModelServer

def load(_settings):
    raise RuntimeError("there is no model")

local._load_model = load
settings = Config(embedding_model="none")
logs.setup(settings)
server = ModelServer(Path(sys.argv[1]) / "model-0.sock", settings)
server.engine.loaded.wait()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for line in sys.stdin:
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        print("full", flush=True)
    sys.stdin.readline()
    for file in taken:
        os.close(file)
"""


def test_a_process_out_of_descriptors_accepts_workers_once_it_has_some_again(tmp_path):
    import socket

    (tmp_path / "metrics").mkdir()
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("fill\n")
        process.stdin.flush()
        assert process.stdout.readline() == "full\n", log.read_text()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(RuntimeFolder(tmp_path).socket(0)))
        wait_until(lambda: "could not be accepted" in log.read_text(), "a line in the log")
        process.stdin.write("free\n")
        process.stdin.flush()
        sock.settimeout(60)
        message = wire.Channel(sock).receive()
        assert isinstance(message, wire.StatusNotice)
        assert isinstance(message.status, Status)
        sock.close()
    finally:
        process.kill()
        process.communicate()
