"""Helpers of these tests: a run in a process of its own, its input and its output."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pyarrow
from pyarrow import parquet

from embedding_service import embed_file
from embedding_service.bulk.paths import Paths
from embedding_service.engine import Embeddings, EmbedRequest, Timings
from tests.fakes import FakeEngine
from tests.service import ROOT, RUN_FOLDER, wait_until

HEADER_BYTES = 128


DIMENSION = 384


class Run:
    """A `python -m embedding_service.embed_file` process, and its peak memory."""

    def __init__(
        self, *arguments: object, stdin: int | IO[bytes] = subprocess.DEVNULL, **settings: str
    ) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "HOME", "LANG", RUN_FOLDER) or name.startswith(("HF_", "COVERAGE_"))
        }
        kept["CACHE_FOLDER"] = str(Path(os.environ[RUN_FOLDER], "cache"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embedding_service.embed_file", *map(str, arguments)],
            cwd=ROOT,
            env=kept | settings,
            stdin=stdin,
            stderr=subprocess.PIPE,
            text=True,
            # In a background job, the shell makes the tests and their children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        self.peak_mib = 0.0
        self.said = ""

    def is_over(self) -> bool:
        """Sample its memory; returns whether it has ended."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            self.peak_mib = max(self.peak_mib, *(int(kib) / 1024 for kib in peak), 0.0)
        except (OSError, psutil.Error):
            pass
        return self.process.poll() is not None

    def wait(self, seconds: float = 300.0) -> int:
        """Wait for the exit code; its output is then in `said`."""
        try:
            wait_until(self.is_over, "the end of embed_file", seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self.said = self.process.communicate()[1]
        return self.process.returncode


def write_corpus(path: Path, count: int) -> list[str]:
    """Write distinct short texts as JSON objects."""
    subjects = ["cats", "the sea", "tax law", "red wine", "old trains", "rain", "chess"]
    texts = [f"Note {i * 7919 % 1_000_003} about {subjects[i % 7]}." for i in range(count)]
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return texts


def rows_in(output: Path, dimension: int = DIMENSION) -> int:
    """The number of rows in an unfinished output."""
    path = Paths(output).part
    return (path.stat().st_size - HEADER_BYTES) // (4 * dimension) if path.exists() else 0


class Numbers(FakeEngine):
    """Embeds the text of a number as that number."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        vectors = np.array([[int(text) if text.isdigit() else 0, 0, 1] for text in request.texts], np.float32)
        return Embeddings(vectors=vectors, tokens=1, truncated=[], timings=Timings())


def main(monkeypatch, *arguments: object) -> int:
    """`embed_file` in this process, for runs that end before they need a model."""
    monkeypatch.setattr(sys, "argv", ["embed_file", *map(str, arguments)])
    return embed_file.main()


TEXTS = ["plain", 'a "quoted", one', "two\nlines", "Ünïcode 中文 🙂", "x" * 70_000]


def written(kind: str) -> bytes:
    """The same texts in each format, next to another field."""
    if kind == "txt":
        return "\n".join(text.replace("\n", " ") for text in TEXTS).encode()
    if kind in ("csv", "tsv"):
        table = io.StringIO(newline="")
        csv.writer(table, delimiter="\t" if kind == "tsv" else ",").writerows(
            [["id", "text"], *enumerate(TEXTS)]
        )
        return table.getvalue().encode()
    if kind == "parquet":
        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), file)
        return file.getvalue()
    objects = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    if kind == "json":
        return json.dumps([*objects[:-1], TEXTS[-1]], indent=2).encode()
    return "".join(json.dumps(each) + "\n" for each in objects).encode()


JOB = {
    "input_bytes": 1,
    "input_hash": "h",
    "format": "jsonl",
    "delimiter": "",
    "field": "text",
    "model": "m",
    "fingerprint": "f",
    "dimension": 2,
}


CHUNKED = JOB | {"overflow": "chunks"}


def read_lines(output: Path) -> list[dict]:
    """The rows of a .jsonl."""
    return [json.loads(line) for line in output.read_text().splitlines()]
