"""Helpers of these tests: a run in a process of its own, its input and its output."""

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import psutil
import pyarrow
from pyarrow import parquet

from embedding_service import embed_file
from embedding_service.bulk.paths import Paths
from embedding_service.engine import Embeddings, EmbedRequest, Status, Timings
from embedding_service.errors import Unavailable
from tests.fakes import INFO, FakeEngine
from tests.service import ROOT, RUN_FOLDER, Service, wait_until

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
    """Embeds the text of a number as that number. After `left` more texts it refuses, and a run waits."""

    left = math.inf

    def embed(self, request: EmbedRequest) -> Embeddings:
        self.left -= len(request.texts)
        if self.left < 0:
            raise Unavailable("the limit of this test is reached", retry_after_seconds=0.1)
        return Embeddings(vectors=self.vectors(request.texts), tokens=1, truncated=[], timings=Timings())

    def vectors(self, texts: list[str]) -> np.ndarray:
        return np.array([[int(text) if text.isdigit() else 0, 0, 1] for text in texts], np.float32)


class Behind(Numbers):
    """Embeds as the service behind it does."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service
        self.current = Status(
            state="healthy", info=msgspec.structs.replace(INFO, embedding_dimension=DIMENSION)
        )

    def vectors(self, texts: list[str]) -> np.ndarray:
        return np.array(self._service.post("/embed", {"texts": texts}).json()["embeddings"], np.float32)


def end_midway(
    url: str,
    engine: Numbers,
    *command: object,
    rows: int,
    spare: int,
    dimension: int = 3,
    number: signal.Signals = signal.SIGKILL,
) -> Run:
    """Start a run and end it at this many rows; the engine refuses before it has `spare` more."""
    output = Path(str(command[command.index("-o") + 1]))
    engine.left = rows - rows_in(output, dimension) + spare
    ended = Run(*command, "--url", url)
    wait_until(lambda: rows_in(output, dimension) >= rows or ended.is_over(), f"{rows} rows", 300)
    ended.process.send_signal(number)
    assert ended.wait() in (-number, 130), ended.said
    assert rows <= rows_in(output, dimension) <= rows + spare
    assert not output.exists()
    engine.left = math.inf
    return ended


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
