"""Every line of every process has the configured format."""

import json
import re
import signal
import subprocess
import sys

import requests

from tests.service import ROOT

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

PROGRAM = """
import logging, sys, threading, warnings
from embedding_service.observability import logs
from embedding_service.settings.config import Config
logs.setup(Config(log_format=sys.argv[1]))
library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
library.propagate = False
logs.adopt_libraries()
library.warning("a library's line")
warnings.warn("a warning")
print("printed")
print("in two", "pieces", file=sys.stderr)
sys.stderr.write("\\n\\rprogress 1\\rprogress 2\\n")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise RuntimeError("the end")
"""


def output(form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return (done.stdout + done.stderr).splitlines()


def test_json_has_what_libraries_print_and_uncaught_exceptions():
    records = [json.loads(line) for line in output("json")]
    assert all(STAMP.fullmatch(record["time"]) for record in records)
    assert [
        (record["logger"], record["message"]) for record in records if record["logger"] != "py.warnings"
    ] == [
        ("library", "a library's line"),
        ("stdout", "printed"),
        ("stderr", "in two pieces"),
        ("stderr", "progress 1"),
        ("stderr", "progress 2"),
        ("uncaught", "ZeroDivisionError: division by zero"),
        ("uncaught", "RuntimeError: the end"),
    ]
    assert "Traceback" in records[-1]["traceback"]


def test_lines_of_libraries_have_our_text_format():
    assert any(line.endswith("WARNING library a library's line") for line in output("text"))


def test_every_line_of_a_service_is_json(start, tmp_path):
    (tmp_path / "file").touch()
    service = start(LOG_FORMAT="json", LOG_LEVEL="debug", CACHE_FOLDER=str(tmp_path / "file" / "below"))
    service.wait_ready()
    service.post("/embed", {"texts": "hello"})
    service.post("/embed", {"texts": 3})
    assert service.stop(signal.SIGTERM) == 0
    records = [json.loads(line) for line in service.log().splitlines()]
    assert {"gunicorn.error", "inference.loading"} <= {record["logger"] for record in records}
    assert not [r for r in records if "loss_type" in r["message"] or "Current configuration" in r["message"]]
    assert len([r for r in records if "CACHE_FOLDER cannot be written" in r["message"]]) == 1


def test_output_of_native_code_in_the_model_process_is_json(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'embedding_service.sharing.server' in sys.orig_argv:\n"
        "    os.write(1, b'from C\\n')\n    os.write(2, b'{not ours\\n')\n"
    )
    service = start(LOG_FORMAT="json", PYTHONPATH=str(tmp_path)).wait_ready()
    assert service.stop() == 0
    records = [json.loads(line) for line in service.log().splitlines()]
    assert {"from C", "{not ours"} <= {record["message"] for record in records}


def test_a_request_leaves_no_id_behind(start_without_model):
    service = start_without_model(LOG_FORMAT="json", LOG_LEVEL="debug").wait_ready()
    with requests.Session() as client:
        for name in ("first", "second"):
            headers = {"X-Request-ID": name}
            assert client.post(f"{service.url}/embed", json={"texts": "a"}, headers=headers).ok
    assert service.stop() == 0
    records = [json.loads(line) for line in service.log().splitlines()]
    assert not [r for r in records if r["logger"] == "gunicorn.error" and "request_id" in r]
