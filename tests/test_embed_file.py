"""embed_file writes every row once, whatever happens: against the real service and in one process."""

import base64
import csv
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import IO

import httpx2
import hypothesis
import msgspec
import numpy as np
import psutil
import pyarrow
import pytest
import requests
from hypothesis import strategies
from pyarrow import parquet
from sentence_transformers.util import quantize_embeddings

from embedding_service import embed_file
from embedding_service.bulk import compression, paths
from embedding_service.bulk.embedders import (
    Description,
    Embedded,
    Options,
    RemoteEmbedder,
    Stopped,
    retry_after_seconds,
)
from embedding_service.bulk.part import PartFile, Place, RunRecord
from embedding_service.bulk.pipeline import Patient, run
from embedding_service.bulk.rows import Row
from embedding_service.bulk.source import FORMATS, InputFile
from embedding_service.engine import Chunk, Embeddings, EmbedRequest, Timings
from embedding_service.errors import StartupError, TooLarge
from tests.fakes import FakeEngine, Served
from tests.service import ROOT, wait_until

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
            if name in ("PATH", "HOME", "LANG") or name.startswith(("HF_", "COVERAGE_"))
        }
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
            wait_until(self.is_over, seconds, "the end of embed_file")
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
    path = paths.part_path(output)
    return (path.stat().st_size - HEADER_BYTES) // (4 * dimension) if path.exists() else 0


def interrupt_and_resume(url: str, folder: Path, oracle, count: int, number: signal.Signals) -> Run:
    """Interrupt a run in the middle, resume it, and check the rows of the output."""
    corpus, output = folder / "corpus.jsonl", folder / "vectors.npy"
    texts = write_corpus(corpus, count)
    command = (corpus, "-o", output, "--url", url, "--batch", 32 if count < 10_000 else 256)

    first = Run(*command)
    wait_until(lambda: rows_in(output) >= count // 3 or first.is_over(), 1800, "a third of the rows")
    first.process.send_signal(number)
    assert first.wait() in (-number, 130)
    done = rows_in(output)
    assert count // 3 <= done < count and not output.exists()

    second = Run(*command)
    assert second.wait(1800) == 0, second.said
    vectors = np.load(output, mmap_mode="r")
    assert vectors.shape == (count, DIMENSION) and vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    # No row occurs twice, and the sampled rows, some of them around the interruption, match their lines.
    assert len(np.unique(np.round(vectors, 4), axis=0)) == count
    sampled = sorted({*range(0, count, count // 150), *range(done - 70, done + 70)})
    expected = oracle.encode([texts[i] for i in sampled], normalize_embeddings=True)
    assert np.abs(vectors[sampled] - expected).max() < 1e-5
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.jsonl", "vectors.npy"]
    second.peak_mib = max(first.peak_mib, second.peak_mib)
    return second


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_an_interrupted_run_resumes_with_every_row_once(service, oracle, tmp_path, number):
    resumed = interrupt_and_resume(service.url, tmp_path, oracle, 4000, number)
    assert resumed.peak_mib < 200


@pytest.mark.long
def test_100_000_lines_with_a_kill_in_the_middle(service, oracle, tmp_path, record_property):
    began = time.monotonic()
    resumed = interrupt_and_resume(service.url, tmp_path, oracle, 100_000, signal.SIGKILL)
    seconds = time.monotonic() - began
    print(f"100,000 lines with a kill and a resume: {seconds:.0f} s, peak memory {resumed.peak_mib:.0f} MiB")
    record_property("peak_mib", resumed.peak_mib)
    assert resumed.peak_mib < 200


class Numbers(FakeEngine):
    """Embeds the text of a number as that number."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        vectors = np.array([[int(text) if text.isdigit() else 0, 0, 1] for text in request.texts], np.float32)
        return Embeddings(vectors=vectors, tokens=1, truncated=[], timings=Timings())


def test_a_run_in_the_background_says_so_in_every_request(tmp_path, monkeypatch):
    corpus, priorities = tmp_path / "corpus.txt", set()

    class Listening(Numbers):
        def embed(self, request: EmbedRequest) -> Embeddings:
            priorities.add(request.priority)
            return super().embed(request)

    corpus.write_text("1\n2\n")
    served = Served(Listening())
    try:
        arguments = (corpus, "-o", tmp_path / "v.npy", "--url", served.url, "--priority", "background")
        assert main(monkeypatch, *arguments) == 0
    finally:
        served.stop()
    assert priorities == {"background"}


@pytest.mark.process
def test_all_of_100_000_rows_are_written_once_despite_two_kills(tmp_path):
    """Over HTTP, with a model that takes no time, so that every row can be checked."""
    count, corpus, output = 100_000, tmp_path / "corpus.txt", tmp_path / "vectors.npy"
    corpus.write_text("".join(f"{number + 1}\n" for number in range(count)))
    served = Served(Numbers())
    try:
        for done in (20_000, 60_000):
            killed = Run(corpus, "-o", output, "--url", served.url)
            wait_until(lambda: rows_in(output, 3) >= done or killed.is_over(), 300, "some rows")  # noqa: B023
            killed.process.kill()
            assert killed.wait() == -signal.SIGKILL, killed.said
            assert done <= rows_in(output, 3) < count
        finished = Run(corpus, "-o", output, "--url", served.url)
        assert finished.wait(300) == 0, finished.said
    finally:
        served.stop()
    assert np.array_equal(np.load(output)[:, 0], np.arange(1, count + 1))
    peak_mib = max(killed.peak_mib, finished.peak_mib)
    print(f"100,000 rows with two kills and resumes: peak memory {peak_mib:.0f} MiB")
    assert peak_mib < 200


BAD_LINES = {
    b'{"text": "no end': "not valid JSON",
    b'{"title": "x"}': "the object has no field 'text'",
    b'{"text": 7}': "'text' is not a string but int",
    b"": "the line is blank",
    b'"\\ud800"': "the text is not valid Unicode",
    b'{"text": "\xff"}': "not valid",
    json.dumps(
        {"text": "x" * 100_001}
    ).encode(): "the text has 100001 characters; at most 100000 are allowed",
}


@pytest.mark.process
@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_bad_rows_are_reported_with_their_lines_and_the_rest_are_embedded(service, oracle, tmp_path, ending):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / f"vectors.{ending}"
    good = [f"good text {i}" for i in range(len(BAD_LINES) + 1)]
    lines = [json.dumps(good[0]).encode()]
    for text, line in zip(good[1:], BAD_LINES, strict=True):
        lines += [line, json.dumps({"text": text}).encode()]
    corpus.write_bytes(b"\n".join(lines))

    finished = Run(corpus, "-o", output, "--url", service.url, "--batch", 4)
    assert finished.wait() == 3, finished.said
    for offset, error in enumerate(BAD_LINES.values()):
        assert f"  line {2 * offset + 2}: {error}" in finished.said
    listed = [json.loads(line) for line in paths.errors_path(output).read_text().splitlines()]
    assert [failure["line"] for failure in listed] == list(range(2, 2 * len(BAD_LINES) + 1, 2))

    vectors, errors = read_output(output)
    assert len(vectors) == len(lines)
    expected = oracle.encode(good, normalize_embeddings=True)
    assert np.abs(vectors[::2] - expected).max() < 1e-5
    assert np.isnan(vectors[1::2]).all()
    if ending != "npy":
        assert errors[::2] == [None] * len(good)
        assert errors[1::2] == [failure["error"] for failure in listed]


def read_output(output: Path) -> tuple[np.ndarray, list[str | None]]:
    """The vectors, with NaN for missing ones, and the errors."""
    if output.suffix == ".npy":
        return np.load(output), []
    if output.suffix == ".jsonl":
        table = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        table = parquet.read_table(output).to_pylist()
    assert [row["row"] for row in table] == list(range(len(table)))
    nothing = [np.nan] * DIMENSION
    return np.array([row["embedding"] or nothing for row in table]), [row["error"] for row in table]


@pytest.mark.process
def test_without_a_url_the_model_runs_in_this_process(oracle, tmp_path):
    corpus, output = tmp_path / "corpus.csv", tmp_path / "vectors.npy"
    corpus.write_text('id,body\n1,first\n2,"second,\nin two lines"\n\n3,dritte Zeile äöü\n')
    finished = Run(corpus, "-o", output, "--field", "body", "--dimensions", 64, DEVICE="cpu")
    assert finished.wait() == 0, finished.said
    texts = ["first", "second,\nin two lines", "dritte Zeile äöü"]
    expected = oracle.encode(texts, normalize_embeddings=True, truncate_dim=64)
    assert np.abs(np.load(output) - expected).max() < 1e-5


def test_overload_and_a_killed_model_process_lose_no_row(start, oracle, tmp_path):
    running = start(MAX_QUEUED_TOKENS="1500", LOG_LEVEL="debug").wait_ready()
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "vectors.npy"
    texts = write_corpus(corpus, 1200)
    embedding = Run(corpus, "-o", output, "--url", running.url, "--batch", 32, "--in-flight", 6)
    wait_until(lambda: rows_in(output) >= 300 or embedding.is_over(), 300, "300 rows")
    running.model_process().kill()
    assert embedding.wait() == 0, embedding.said
    log = running.log()
    assert "429 overloaded" in log and "503 unavailable" in log
    vectors = np.load(output)
    assert len(np.unique(np.round(vectors, 4), axis=0)) == len(texts)
    expected = oracle.encode(texts[::10], normalize_embeddings=True)
    assert np.abs(vectors[::10] - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jsonl", "-o", "v.npy"], "is not a file"),
        (["corpus.jsonl", "-o", "v.xlsx"], "must end in .npy, .jsonl, .parquet"),
        (["corpus.jsonl", "-o", "nowhere/v.npy"], "is not a folder"),
        (["corpus.jsonl", "-o", "there.npy"], "--restart replaces it"),
        (["corpus.jsonl", "-o", "folder.npy"], "exists and is not a regular file"),
        (["corpus.jsonl", "-o", "v.npy.errors.jsonl"], "for lists of bad rows"),
        (["corpus.jsonl", "-o", "v.npy.chunks.jsonl"], "for the places of chunks"),
        (["corpus.jsonl", "-o", "v" * 250 + ".npy"], "name too long"),
        (["corpus.pdf", "-o", "v.npy"], "must end in .jsonl"),
        (["corpus.jsonl", "-o", "v.npy", "--chunk-overlap", "9"], "--chunk-overlap needs --overflow mean"),
        (["table.csv", "-o", "v.npy"], "there is no column 'text'; the columns are a, b"),
        (["corpus.jsonl", "-o", "v.npy", "--url", "localhost:1"], "http://localhost:1/ does not answer"),
        (["corpus.jsonl", "-o", "v.npy", "--url", "http://127.0.0.1:1"], "does not answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_command_that_cannot_start_says_why_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    for name in ("corpus.jsonl", "corpus.pdf", "there.npy"):
        (tmp_path / name).write_text('"text"\n')
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "folder.npy").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embed_file", *arguments])
    assert embed_file.main() == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def main(monkeypatch, *arguments: object) -> int:
    """`embed_file` in this process, for runs that end before they need a model."""
    monkeypatch.setattr(sys, "argv", ["embed_file", *map(str, arguments)])
    return embed_file.main()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its inode and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.lstat().st_ino, path.read_bytes()) for path in files}


OURS = ["", ".part", ".part.json", ".errors.jsonl", ".chunks.jsonl", ".part.new", ".part.json.part.new"]


@pytest.mark.parametrize("restart", [[], ["--restart"]], ids=["", "restart"])
@pytest.mark.parametrize("link", ["path", "symlink", "hard link", "symlinked folder"])
@pytest.mark.parametrize("suffix", OURS, ids=lambda suffix: suffix or "output")
def test_a_run_never_overwrites_its_input(tmp_path, monkeypatch, capsys, suffix, link, restart):
    output = tmp_path / "v.jsonl"
    ours = output.with_name(output.name + suffix)
    corpus = tmp_path / "corpus.jsonl"
    if link == "path":
        corpus = ours
    corpus.write_text('{"text": "keep me"}\n')
    if link == "symlink":
        ours.symlink_to(corpus)
    elif link == "hard link":
        ours.hardlink_to(corpus)
    elif link == "symlinked folder":
        corpus.rename(ours)
        (tmp_path / "alias").symlink_to(tmp_path)
        corpus = tmp_path / "alias" / ours.name
    before = snapshot(tmp_path)
    assert main(monkeypatch, corpus, "-o", output, *restart) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert snapshot(tmp_path) == before


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("restart", [[], ["--restart"]], ids=["", "restart"])
@pytest.mark.parametrize("make", [a_folder, a_pipe])
@pytest.mark.parametrize("suffix", OURS, ids=lambda suffix: suffix or "output")
def test_a_folder_or_pipe_in_place_of_an_output_file_is_left_alone(
    tmp_path, monkeypatch, capsys, suffix, make, restart
):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "v.npy"
    corpus.write_text('"text"\n')
    make(output.with_name(output.name + suffix))
    assert main(monkeypatch, corpus, "-o", output, *restart) == 2
    said = capsys.readouterr().err
    assert "exists and is not a regular file" in said and said.count("\n") == 1


@pytest.mark.parametrize("suffix", OURS[1:4])
def test_a_file_that_is_not_ours_is_not_replaced_without_restart(tmp_path, suffix):
    output = tmp_path / "v.npy"
    foreign = output.with_name(output.name + suffix)
    foreign.write_text("someone's")
    before = snapshot(tmp_path)
    with pytest.raises(StartupError, match="--restart replaces it"):
        paths.require_room(Path(__file__).stat(), output, restart=False)
        PartFile(output, JOB)
    assert snapshot(tmp_path) == before
    paths.require_room(Path(__file__).stat(), output, restart=True)
    PartFile(output, JOB, restart=True).close()
    assert "someone's" not in {path.read_bytes().decode(errors="replace") for path in tmp_path.iterdir()}


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_a_run_does_not_start_if_two_of_its_files_are_the_same(tmp_path, monkeypatch, capsys, kind):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "v.npy"
    corpus.write_text('"text"\n')
    paths.errors_path(output).write_text("")
    if kind == "symlink":
        paths.part_path(output).symlink_to(paths.errors_path(output))
    else:
        paths.part_path(output).hardlink_to(paths.errors_path(output))
    assert main(monkeypatch, corpus, "-o", output) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_restart_spares_hard_links_to_its_part_and_a_run_in_progress(tmp_path):
    output, kept = tmp_path / "v.npy", tmp_path / "kept"
    kept.write_bytes(b"x" * 1000)
    paths.part_path(output).hardlink_to(kept)
    first = PartFile(output, JOB, restart=True)
    assert kept.read_bytes() == b"x" * 1000
    first.append(np.ones((1, 2), np.float32), [], [Place(0)])
    with pytest.raises(StartupError, match="another run is writing"):
        PartFile(output, JOB, restart=True)
    first.append(np.zeros((1, 2), np.float32), [], [Place(1)])
    first.seal()
    assert np.load(first.path).tolist() == [[1, 1], [0, 0]]


def test_an_unwritable_folder_stops_the_run_at_the_start(tmp_path, monkeypatch, capsys):
    """Root can write anywhere but in /proc, and finds that out later than other users."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('"text"\n')
    served = Served(Numbers())
    try:
        assert main(monkeypatch, corpus, "-o", "/proc/v.npy", "--url", served.url) == 2
    finally:
        served.stop()
    said = capsys.readouterr().err
    assert "/proc" in said and said.count("\n") == 1


def test_restart_keeps_the_old_files_until_the_run_can_start(tmp_path, monkeypatch):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "v.npy"
    corpus.write_text('"text"\n')
    part = PartFile(output, JOB)
    part.append(np.ones((1, 2), np.float32), [], [Place(0)])
    part.close()
    before = snapshot(tmp_path)
    assert main(monkeypatch, corpus, "-o", output, "--restart", "--url", "http://127.0.0.1:1") == 2
    assert snapshot(tmp_path) == before


def test_every_line_of_a_txt_file_is_a_row(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\n\xff\n  spaces  \nlast")
    found = list(InputFile(path, "text").rows())
    assert [(row.number, row.line, row.text) for row in found if not row.error] == [
        (0, 1, "first"),
        (1, 2, ""),
        (3, 4, "  spaces  "),
        (4, 5, "last"),
    ]
    assert found[2] == Row(2, 3, error="not UTF-8 at byte 0")
    assert InputFile(path, "text").count() == 5


def test_csv_records_have_the_line_on_which_they_begin(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'id,text\n1,"a\nb"\n2\n\n3,\xff\n4,d\n')
    found = list(InputFile(path, "text").rows())
    assert [(row.number, row.line, row.text) for row in found] == [
        (0, 2, "a\nb"),
        (1, 4, ""),
        (2, 6, ""),
        (3, 7, "d"),
    ]
    assert [bool(row.error) for row in found] == [False, True, True, False]
    assert InputFile(path, "text").count() == 4


CSV_FAULTS = {
    b'text,id\na,1\n"unclosed,2\nb,3\nc,4\nd,5\n': ["a", 3, "b", "c", "d"],
    b'text,id\n"a"b,1\nc,2\n': [2, "c"],
    b'text,id\n"a"b,1\n"unclosed,2\nb,3\n"c"d,2\nd,5\n"e': [2, 3, "b", 5, "d", 7],
    b'id,text,z\n1,"a\nb","unclosed\n2,x,3\n': [3, "x"],
    b'id,text,z\n1,"unclosed,3\n2,",",3\n4,5,6\n': [2, ",", "5"],
    b'text,id\n"unclosed,1\nb,2\nc"\nd,3\n': [2, "b", 'c"', "d"],
    b'\xef\xbb\xbftext,id\r\n"a\r\nb",1\r\n\r\n"c"x,2\r\nd,3\re,4\n\0,5': ["a\r\nb", 5, "d", "e", "\0"],
    b'text,id\na"b,1\n"c""d",2\n': ['a"b', 'c"d'],
    b'text,id\n"' + b"x" * (17 << 20) + b'",1\nb,2\n': [2, "b"],
    b'text,id\n"' + (b"x" * 999 + b"\n") * (17 << 10) + b"b,2\n": [2, "b"],
}


@pytest.mark.parametrize("content", CSV_FAULTS, ids=lambda content: content[:40].decode("latin-1"))
def test_quoting_faults_are_bad_rows_and_the_rows_after_them_are_kept(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    found = list(InputFile(path, "text").rows())
    assert [row.line if row.error else row.text for row in found] == CSV_FAULTS[content]
    assert [row.number for row in found] == list(range(len(found)))
    assert InputFile(path, "text").count() == len(found)


class Strict(msgspec.Struct):
    """What the csv module reads: the records before a fault with their lines, and where the fault is."""

    records: list[tuple[int, int, list[str]]]
    fault_lines: range

    @classmethod
    def read(cls, content: str) -> "Strict":
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        records, fault = [], range(0)
        while True:
            first = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return cls(records, fault)
            except csv.Error:
                return cls(records, range(first, reader.line_num + 1))
            if record:
                records.append((first, reader.line_num, record))


@hypothesis.given(
    table=strategies.lists(
        strategies.lists(strategies.text('ab", \n\ré\0', max_size=6), min_size=2, max_size=2)
    ),
    quoting=strategies.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    end=strategies.sampled_from(["\n", "\r\n"]),
    damages=strategies.lists(
        strategies.tuples(strategies.floats(0, 1), strategies.sampled_from(["", '"', "\n"]))
    ),
)
@hypothesis.settings(
    max_examples=500,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_damaged_csv_against_the_csv_module_in_strict_mode(tmp_path, table, quoting, end, damages):
    """Characters are deleted, and quotes and line ends inserted, before three intact records."""
    written = io.StringIO(newline="")
    csv.writer(written, quoting=quoting, lineterminator=end).writerows(table)
    damaged = written.getvalue()
    for place, what in damages:
        at = int(place * len(damaged))
        damaged = damaged[:at] + (what or "") + damaged[at + (not what) :]
    tail = ["tail 1", "tail 2", "tail 3"]
    content = f"text,id{end}{damaged}{end}" + "".join(f"{text},0{end}" for text in tail)
    path = tmp_path / "damaged.csv"
    path.write_bytes(content.encode())
    found = list(InputFile(path, "text").rows())

    strict = Strict.read(content)
    before = strict.records[1:]
    # A record over several lines with too many or too few fields has swallowed others.
    swallowed = [i for i, (first, last, record) in enumerate(before) if first != last and len(record) != 2]
    before = before[: swallowed[0]] if swallowed else before
    assert [(row.line, row.text) for row in found[: len(before)]] == [
        (line, record[0]) for line, _, record in before
    ]
    if swallowed:
        assert found[len(before)].line == strict.records[1 + swallowed[0]][0] and found[len(before)].error
    elif strict.fault_lines:
        assert found[len(before)].line in strict.fault_lines and found[len(before)].error
    else:
        assert len(found) == len(before)
    assert [row.text for row in found[-3:]] == tail
    assert [row.number for row in found] == list(range(len(found)))
    starts = [row.line for row in found]
    assert starts == sorted(set(starts))


@pytest.mark.process
def test_a_run_over_damaged_csv_resumes_exactly_where_it_stopped(tmp_path):
    corpus, output = tmp_path / "corpus.csv", tmp_path / "vectors.npy"
    texts = [f"{number}" if number % 7 else '"unclosed' for number in range(1, 20_001)]
    corpus.write_text("text,id\n" + "".join(f"{text},0\n" for text in texts))
    served = Served(Numbers())
    try:
        killed = Run(corpus, "-o", output, "--url", served.url)
        wait_until(lambda: rows_in(output, 3) >= 5000 or killed.is_over(), 300, "some rows")
        killed.process.kill()
        assert killed.wait() == -signal.SIGKILL, killed.said
        finished = Run(corpus, "-o", output, "--url", served.url)
        assert finished.wait(300) == 3, finished.said
    finally:
        served.stop()
    expected = [float(text) if text.isdigit() else np.nan for text in texts]
    assert np.array_equal(np.load(output)[:, 0], expected, equal_nan=True)
    listed = [json.loads(line) for line in paths.errors_path(output).read_text().splitlines()]
    assert [failure["line"] for failure in listed] == [
        i + 2 for i, text in enumerate(texts) if not text.isdigit()
    ]


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


PACK = {"": bytes, ".gz": gzip.compress, ".zst": compression.zstd.compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_texts_compressed_or_not(tmp_path, kind, packed):
    path = tmp_path / f"corpus.{kind}{packed}"
    path.write_bytes(PACK[packed](written(kind)))
    expected = [text.replace("\n", " ") for text in TEXTS] if kind == "txt" else TEXTS
    source = InputFile(path, "text")
    assert [row.text for row in source.rows()] == expected
    assert source.count() == len(TEXTS)


@pytest.mark.process
@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", FORMATS)
def test_standard_input_gives_the_same_vectors_as_a_file(tmp_path, kind, packed):
    corpus, output = tmp_path / f"corpus.{kind}{packed}", tmp_path / "vectors.npy"
    corpus.write_bytes(PACK[packed](written(kind)))
    served = Served(Lengths())
    try:
        with corpus.open("rb") as file:
            finished = Run("-", "-o", output, "--url", served.url, "--format", kind, stdin=file)
            assert finished.wait() == 0, finished.said
    finally:
        served.stop()
    assert np.load(output)[:, 0].tolist() == [len(text) for text in TEXTS]


class Lengths(FakeEngine):
    """Embeds a text as its length."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        vectors = np.array([[len(text), 0, 1] for text in request.texts], np.float32)
        return Embeddings(vectors=vectors, tokens=1, truncated=[], timings=Timings())


def test_a_run_from_a_pipe_cannot_resume_and_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    output, pipe = tmp_path / "v.npy", tmp_path / "pipe"
    os.mkfifo(pipe)
    PartFile(output, JOB).close()
    before = snapshot(tmp_path)
    for name in (pipe, "-"):
        assert main(monkeypatch, name, "-o", output) == 2
        said = capsys.readouterr().err
        assert "--restart starts over" in said and said.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("cut", [1, 9])
@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json", "parquet", "csv.gz"])
def test_a_truncated_input_is_detected_before_the_run(tmp_path, monkeypatch, capsys, kind, cut):
    corpus = tmp_path / f"corpus.{kind}"
    kind, _, packed = kind.partition(".")
    corpus.write_bytes(PACK[packed and f".{packed}"](written(kind))[:-cut])
    assert main(monkeypatch, corpus, "-o", tmp_path / "v.npy") == 2
    said = capsys.readouterr().err
    assert str(corpus) in said and said.count("\n") == 1


REFUSED = {
    "wrong.jsonl": (
        b'{"id": 1, "body": "a"}\n' * 150,
        [],
        "none of the first 100 rows has a text",
        "id, body",
    ),
    "wrong.json": (b'[{"id": 1, "body": "a"}]', [], "none of the first 1 rows", "its fields: id, body"),
    "number.jsonl": (b'{"id": 1, "text": "a"}\n', ["--field", "id"], "'id' is not a string but int", ""),
    "lines.jsonl": (b"plain text\n" * 3, [], "not valid JSON", "--format"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', [], "not a JSON array", "--format jsonl"),
    "trailing.json": (b'["a"] ["b"]', [], "there is something after the array", ""),
    "empty.json": (b" \n", [], "the file is empty", ""),
    "empty.csv": (b"", [], "the file is empty", ""),
    "header.csv": (b'text,"id\na,1\n', [], "the header cannot be read, line 1", "never closed"),
    "semicolon.csv": (b"id;text\n1;a\n", [], "there is no column 'text'; the columns are id;text", ""),
    "wide.csv": (b"text\na\n", ["--delimiter", "::"], "--delimiter '::' must be one character", ""),
    "lines.txt": (b"a\n", ["--delimiter", ";"], "--delimiter is for csv and tsv", "read as txt"),
    "utf16.csv": ("text\na\n".encode("utf-16"), [], "it is UTF-16; only UTF-8 is supported", ""),
    "utf16.jsonl": ('"a"\n'.encode("utf-16"), [], "it is UTF-16; only UTF-8 is supported", ""),
    "text.parquet": (b"PAR1 not", [], "not a valid parquet file", ""),
    "numbers.parquet": (written("parquet"), ["--field", "id"], "the column 'id' holds int64, not text", ""),
    "names.parquet": (
        written("parquet"),
        ["--field", "body"],
        "no column 'body'; the columns are id, text",
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_input_without_texts_is_rejected_in_one_line_that_lists_its_fields(
    tmp_path, monkeypatch, capsys, name
):
    content, options, *words = REFUSED[name]
    corpus = tmp_path / name
    corpus.write_bytes(content)
    assert main(monkeypatch, corpus, "-o", tmp_path / "v.npy", *options) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("module", ["pyarrow", "backports.zstd"])
def test_a_missing_package_is_named_in_one_line(tmp_path, monkeypatch, capsys, module):
    kind = "parquet" if module == "pyarrow" else "zst"
    corpus = tmp_path / f"corpus.{kind}"
    corpus.write_bytes(written("parquet") if kind == "parquet" else PACK[".zst"](b'"a"\n'))
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(compression, "zstd", None)
    assert (
        main(
            monkeypatch,
            corpus,
            "-o",
            tmp_path / "v.npy",
            *([] if kind == "parquet" else ["--format", "jsonl"]),
        )
        == 2
    )
    said = capsys.readouterr().err
    assert f"pip install {module}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "unused",
    [b"1e999", b"NaN", b"-Infinity", b'"\\ud800"', b'"\xff"', b"[" * 500 + b"]" * 500, b"1" * 400],
    ids=lambda unused: unused[:9].decode("latin-1"),
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_an_unused_field_never_makes_a_row_bad(tmp_path, kind, unused):
    path = tmp_path / f"corpus.{kind}"
    line = b'{"x": ' + unused + b', "text": "a"}'
    path.write_bytes(b"[" + line + b"]" if kind == "json" else line)
    assert list(InputFile(path, "text").rows()) == [Row(0, 1, "a")]


def test_json_elements_have_line_numbers_and_bad_ones_fail_alone(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_bytes(
        b'\xef\xbb\xbf\n [\n"a [,] \\" b",\n\n {"text": nope}, {"text":\n"\xff"},7,'
        b'{"text": "c", "x": [{}]}\n,]\n'
    )
    found = list(InputFile(path, "text").rows())
    assert [(row.line, row.text) for row in found if not row.error] == [(3, 'a [,] " b'), (6, "c")]
    assert [(row.line, row.error[:24]) for row in found if row.error] == [
        (5, "not valid JSON: JSON is "),
        (5, "not valid JSON: 'utf-8' "),
        (6, "'text' is not a string b"),
        (7, "the line is blank"),
    ]
    path.write_bytes(b"[ \n]\n")
    assert list(InputFile(path, "text").rows()) == []


def test_parquet_values_without_a_text_are_bad_rows(tmp_path):
    path = tmp_path / "corpus.parquet"
    values = pyarrow.array([b"a", None, b"\xff", b"d"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": values}), path)
    assert [(row.text, row.error) for row in InputFile(path, "text").rows()] == [
        ("a", ""),
        ("", "the value is null"),
        ("", "not UTF-8 at byte 0"),
        ("d", ""),
    ]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["x", "y", "x"]).dictionary_encode()}), path)
    assert [row.text for row in InputFile(path, "text").rows()] == ["x", "y", "x"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "jsonl.zst", "csv"])
def test_only_a_part_of_the_file_is_in_memory(tmp_path, kind):
    path, rows = tmp_path / f"corpus.{kind}", 40_000
    line = b'"' + b"x" * 1000 + b'"'
    content = (
        b"[" + b",\n".join([line] * rows) + b"]"
        if kind == "json"
        else (b"text\n" if kind == "csv" else b"") + (line + b"\n") * rows
    )
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](content))
    del content
    tracemalloc.start()
    count = sum(1 for _ in InputFile(path, "text").rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == rows and peak < 4 << 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"field": "body"}, "--field 'text', now 'body'"),
        ({"dimensions": 64}, "--dimensions none, now 64"),
        ({"input_type": "query"}, "--input-type none, now 'query'"),
        ({"prompt": "a: "}, "--prompt none, now 'a: '"),
        (
            {"overflow": "chunks", "chunk_overlap": 9},
            "--overflow none, now 'chunks'; --chunk-overlap none, now 9",
        ),
        ({"format": "csv", "delimiter": ";"}, "--format 'jsonl', now 'csv'; --delimiter '', now ';'"),
        ({"model": "other", "fingerprint": "g"}, "the model 'm', now 'other'"),
        ({"fingerprint": "g"}, "a model with the fingerprint 'f', now 'g'"),
        ({"input_hash": "i"}, "an input with the hash 'h', now 'i'"),
    ],
    ids=str,
)
def test_another_job_is_refused_with_the_old_and_the_new_value(tmp_path, change, words):
    output = tmp_path / "v.npy"
    PartFile(output, JOB).close()
    with pytest.raises(StartupError, match=re.escape(words)):
        PartFile(output, msgspec.structs.replace(JOB, **change))


def test_an_input_that_changes_during_the_run_gives_no_output(tmp_path, monkeypatch, capsys):
    corpus, output = tmp_path / "corpus.txt", tmp_path / "vectors.npy"
    corpus.write_text("1\n2\n3\n")

    class Meddling(Numbers):
        def embed(self, request: EmbedRequest) -> Embeddings:
            if request.texts == ["1", "2", "3"]:
                corpus.write_text("1\n5\n3\n")
            return super().embed(request)

    served = Served(Meddling())
    try:
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url) == 1
        assert "changed while it was being read" in capsys.readouterr().err and not output.exists()
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url) == 2
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--restart") == 0
    finally:
        served.stop()


def test_an_endless_line_is_a_bad_row_and_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "endless.jsonl"
    with path.open("wb") as file:
        file.truncate(200 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n"after it"\n')
    tracemalloc.start()
    found = list(InputFile(path, "text").rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(row.text, row.error) for row in found] == [
        ("", "the line is longer than 16777216 bytes"),
        ("after it", ""),
    ]
    assert peak < 100 << 20


class Scripted:
    """A service that answers as a test says: `answers` gets the texts and gives a response or None."""

    def __init__(self, answers=lambda _texts: None) -> None:
        self.answers = answers
        self.fingerprint = "one"
        self.requests: list[httpx2.Request] = []

    def embedder(self) -> RemoteEmbedder:
        return RemoteEmbedder("http://service", "clé", Options(), httpx2.MockTransport(self._handle))

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.path == "/info":
            info = {"model_name": "m", "fingerprint": self.fingerprint, "max_client_batch_size": 100}
            return httpx2.Response(200, json=info)
        texts = json.loads(request.content)["texts"]
        response = self.answers(texts)
        if response is not None:
            return response
        vectors = [np.array([len(text), 1], np.float32) for text in texts]
        encoded = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        return httpx2.Response(200, json={"embeddings": encoded, "usage": {"truncated": []}})


def refusal(
    status: int, error: str, about: dict[str, str | int] | None = None, **headers: str
) -> httpx2.Response:
    """An error as the service writes it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, json={"error": error, "error_type": "x"} | (about or {}), headers=names)


def numbered(*texts: str) -> list[Row]:
    return [Row(number, number + 1, text) for number, text in enumerate(texts)]


def test_the_key_is_sent_and_a_wrong_one_stops_the_run_at_the_start():
    scripted = Scripted(lambda _texts: refusal(401, "missing or wrong API key"))
    with pytest.raises(StartupError, match="missing or wrong API key"):
        Patient(scripted.embedder(), 10)
    assert {dict(request.headers.raw)[b"Authorization"] for request in scripted.requests} == {
        "Bearer clé".encode()
    }


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(status):
    told: list[float] = []

    def busy_once(texts: list[str]) -> httpx2.Response | None:
        if texts == ["x"]:
            told.append(time.monotonic())
            if len(told) == 1:
                return refusal(status, "later", Retry_After="1")
        return None

    chunk = Patient(Scripted(busy_once).embedder(), 10).embed(numbered("x"))
    assert not chunk.bad
    assert 1.0 <= told[1] - told[0] < 2.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "3", "retry-after-ms": "120"}, 0.12),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_every_form_of_retry_after_is_read(headers, seconds):
    assert retry_after_seconds(httpx2.Headers(headers)) == seconds


@pytest.mark.parametrize("status", [400, 413, 422, 500, 504])
def test_a_single_rejected_text_is_found_and_only_its_row_is_bad(status):
    about = {"field": "texts", "index": 0, "reason": "is poison"}
    scripted = Scripted(
        lambda texts: refusal(status, "texts[0] is poison", about) if "poison" in texts else None
    )
    texts = [f"text {i}" for i in range(64)]
    texts[37] = "poison"
    chunk = Patient(scripted.embedder(), 30).embed(numbered(*texts))
    assert chunk.bad == [Row(37, 38, "poison", "the text is poison")]
    assert np.flatnonzero(np.isnan(chunk.vectors).any(axis=1)).tolist() == [37]
    assert [request.url.path for request in scripted.requests].count("/embed") < 20


def test_a_service_that_fails_completely_for_a_while_makes_no_row_bad():
    failing = iter([False] + [True] * 5)
    scripted = Scripted(lambda _texts: refusal(500, "internal") if next(failing, False) else None)
    chunk = Patient(scripted.embedder(), 120).embed(numbered("a", "b", "c"))
    assert not chunk.bad and not np.isnan(chunk.vectors).any()


def test_it_gives_up_after_the_configured_time():
    answered = iter([None])
    scripted = Scripted(lambda _texts: next(answered, refusal(503, "loading")))
    patient = Patient(scripted.embedder(), 1.5)
    with pytest.raises(Stopped, match=r"nothing was embedded in 2 s: loading"):
        patient.embed(numbered("a"))


def test_another_model_behind_the_same_url_stops_the_run():
    scripted = Scripted()
    patient = Patient(scripted.embedder(), 10)
    away = iter([refusal(503, "loading")])
    scripted.answers = lambda _texts: next(away, None)
    scripted.fingerprint = "two"
    with pytest.raises(Stopped, match="another model"):
        patient.embed(numbered("a"))


def test_the_model_of_the_start_is_pinned_and_another_one_stops_the_run():
    scripted = Scripted()
    patient = Patient(scripted.embedder(), 10)
    scripted.answers = lambda _texts: refusal(412, "the model's fingerprint is another")
    with pytest.raises(Stopped, match="fingerprint is another"):
        patient.embed(numbered("a"))
    assert [request.headers.get("x-expect-fingerprint") for request in scripted.requests] == [
        None,
        "one",
        "one",
    ]


JOB = RunRecord(
    input_bytes=1,
    input_hash="h",
    format="jsonl",
    delimiter="",
    field="text",
    model="m",
    fingerprint="f",
    dimension=2,
    input_type=None,
    dimensions=None,
)


def test_a_partial_row_and_errors_without_their_rows_are_dropped(tmp_path):
    output = tmp_path / "v.npy"
    part = PartFile(output, JOB)
    part.append(np.ones((3, 2), np.float32), [Row(1, 2, error="bad")], [Place(0), Place(1), Place(2)])
    part.close()
    with part.path.open("ab") as file:
        file.write(b"\0\0\0")
    with part.errors_path.open("ab") as file:
        file.write(b'{"row":3,"line":4,"error":"of a chunk that was not written"}\n{"row":4,"li')
    again = PartFile(output, JOB)
    assert (again.rows, again.failures) == (3, 1)
    again.append(np.zeros((1, 2), np.float32), [], [Place(3)])
    again.seal()
    assert np.load(again.path).tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    assert again.errors_path.read_text().count("\n") == 1


def test_a_part_is_closed_to_other_jobs_and_to_a_second_run(tmp_path):
    output = tmp_path / "v.npy"
    part = PartFile(output, JOB)
    with pytest.raises(StartupError, match="another run is writing"):
        PartFile(output, JOB)
    part.close()
    with pytest.raises(StartupError, match="a model with the fingerprint 'f', now 'another'"):
        PartFile(output, msgspec.structs.replace(JOB, fingerprint="another"))


CHUNKED = msgspec.structs.replace(JOB, overflow="chunks")


def append_texts(part: PartFile, first: int, last: int) -> None:
    """Text n has n % 3 + 1 chunks, and their vectors are (n, which chunk); two texts are added at a time."""
    for number in range(first, last, 2):
        rows = [(n, k) for n in range(number, min(number + 2, last)) for k in range(n % 3 + 1)]
        part.append(np.array(rows, np.float32), [], [Place(n, k, k + 1) for n, k in rows])


@pytest.mark.parametrize("lost", ["vectors", "places"])
def test_a_text_of_which_a_chunk_is_missing_is_dropped_and_done_again(tmp_path, lost):
    """Wherever the writing of either file ends: in the middle of a row, of a line, or between two texts."""
    part = PartFile(tmp_path / "whole.npy", CHUNKED)
    append_texts(part, 0, 6)
    part.close()
    vectors, places = part.path.read_bytes(), part.chunks_path.read_bytes()
    header = len(vectors) - 12 * 8
    cuts = range(header, len(vectors) + 1) if lost == "vectors" else range(len(places) + 1)
    for cut in cuts:
        output = tmp_path / f"{cut}.npy"
        for path, content, is_cut in (
            (paths.part_path(output), vectors, lost == "vectors"),
            (paths.chunks_path(output), places, lost == "places"),
            (paths.job_path(output), part.job_path.read_bytes(), False),
        ):
            path.write_bytes(content[:cut] if is_cut else content)
        again = PartFile(output, CHUNKED)
        assert again.rows == sum(n % 3 + 1 for n in range(again.texts))
        if lost == "vectors":
            written = (cut - header) // 8
            assert again.texts == max(n for n in range(7) if sum(m % 3 + 1 for m in range(n)) <= written)
        append_texts(again, again.texts, 6)
        again.close()
        assert paths.part_path(output).read_bytes() == vectors
        assert paths.chunks_path(output).read_bytes() == places


class InChunks(Numbers):
    """Cuts a text into as many chunks as it has characters; the vector of a chunk starts with its digit."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        if request.overflow != "chunks":
            return super().embed(request)
        chunks = [[Chunk(i, i + 1, 1) for i in range(len(text))] for text in request.texts]
        count = sum(map(len, chunks))
        if request.max_chunks is not None and count > request.max_chunks:
            raise TooLarge(f"make {count} pieces; at most {request.max_chunks} are allowed", field="texts")
        digits = [digit for text in request.texts for digit in text]
        return msgspec.structs.replace(
            super().embed(msgspec.structs.replace(request, texts=digits)), chunks=chunks
        )


@pytest.mark.process
def test_each_chunk_of_20_000_texts_is_there_once_after_two_kills(tmp_path):
    count, corpus, output = 20_000, tmp_path / "corpus.txt", tmp_path / "vectors.npy"
    corpus.write_text("".join(f"{number + 1}\n" for number in range(count)))
    expected = [(n, i, int(digit)) for n in range(count) for i, digit in enumerate(str(n + 1))]
    served = Served(InChunks())
    command = (corpus, "-o", output, "--url", served.url, "--overflow", "chunks", "--batch", 64)
    try:
        for done in (20_000, 60_000):
            killed = Run(*command)
            wait_until(lambda: rows_in(output, 3) >= done or killed.is_over(), 300, "some rows")  # noqa: B023
            killed.process.kill()
            assert killed.wait() == -signal.SIGKILL, killed.said
            assert done <= rows_in(output, 3) < len(expected)
        finished = Run(*command)
        assert finished.wait(300) == 0, finished.said
    finally:
        served.stop()
    assert f"Wrote {len(expected)} rows for 20000 texts" in finished.said
    places = read_lines(paths.chunks_path(output))
    digits = np.load(output)[:, 0].astype(int).tolist()
    found = [(place["row"], place["start"], digit) for place, digit in zip(places, digits, strict=True)]
    assert found == expected
    assert max(killed.peak_mib, finished.peak_mib) < 200


@pytest.mark.process
@pytest.mark.parametrize(
    ("here", "ending"),
    [(True, "npy"), (False, "npy"), (False, "jsonl"), (False, "parquet")],
    ids=["here", "npy", "jsonl", "parquet"],
)
def test_over_long_texts_become_a_row_for_each_chunk(service, tmp_path, here, ending):
    long = " ".join(f"wörd{number % 100} and more" for number in range(400))
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, [long, 7, "short", long, ""])))
    output = tmp_path / f"vectors.{ending}"
    where = [] if here else ["--url", service.url]
    options = ["--overflow", "chunks", "--chunk-overlap", 20, "--batch", 2]
    run = Run(tmp_path / "corpus.jsonl", "-o", output, *options, *where)
    assert run.wait() == 3, run.said
    assert [failure["row"] for failure in read_lines(paths.errors_path(output))] == [1]

    body = {"texts": [long, "short", long, ""], "overflow": "chunks", "chunk_overlap": 20}
    answer = requests.post(f"{service.url}/embed", json=body, timeout=60).json()
    expected = [([0, 2, 3, 4][chunk["text"]], chunk["start"], chunk["end"]) for chunk in answer["chunks"]]
    bad = expected.index(next(place for place in expected if place[0] == 2))
    expected.insert(bad, (1, None, None))
    if ending == "npy":
        table, vectors = read_lines(paths.chunks_path(output)), np.load(output)
        assert np.isnan(vectors[bad]).all()
        vectors = np.delete(vectors, bad, axis=0)
    else:
        assert not paths.chunks_path(output).exists()
        table = read_lines(output) if ending == "jsonl" else parquet.read_table(output).to_pylist()
        assert [row["error"] is not None for row in table] == [place[0] == 1 for place in expected]
        vectors = np.array([row["embedding"] for row in table if row["embedding"] is not None])
    assert [(row["row"], row["start"], row["end"]) for row in table] == expected
    assert len(expected) > 10
    assert np.abs(vectors - np.array(answer["embeddings"])).max() < 1e-5


def test_a_text_of_more_chunks_than_the_service_takes_is_a_bad_row(tmp_path, monkeypatch, capsys):
    corpus, output = tmp_path / "corpus.txt", tmp_path / "v.jsonl"
    corpus.write_text("12\n1234567\n890\n")
    served = Served(InChunks(), max_texts_per_request=6)
    try:
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--overflow", "chunks") == 3
    finally:
        served.stop()
    said = capsys.readouterr().err
    assert "line 2: texts make 7 pieces; at most 6 are" in said
    assert [row["row"] for row in read_lines(output)] == [0, 0, 1, 2, 2, 2]


def test_a_run_without_chunks_removes_the_list_of_an_earlier_one(tmp_path, monkeypatch):
    corpus, output = tmp_path / "corpus.txt", tmp_path / "v.npy"
    corpus.write_text("12\n3\n")
    served = Served(InChunks())
    try:
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--overflow", "chunks") == 0
        assert len(read_lines(paths.chunks_path(output))) == len(np.load(output)) == 3
        assert main(monkeypatch, corpus, "-o", output, "--url", served.url, "--restart") == 0
    finally:
        served.stop()
    assert len(np.load(output)) == 2
    assert not paths.chunks_path(output).exists()


class Instant:
    """Embeds without taking any time."""

    def describe(self) -> Description:
        return Description(model="m", fingerprint="f", most_texts=256)

    def embed(self, texts: list[str]) -> Embedded:
        return Embedded(np.ones((len(texts), 2), np.float32), 0)

    def close(self) -> None:
        pass


class InstantChunks(Instant):
    """Makes three chunks of each text."""

    def embed(self, texts: list[str]) -> Embedded:
        chunks = [[(0, 1), (1, 2), (2, 3)]] * len(texts)
        return Embedded(np.ones((3 * len(texts), 2), np.float32), 0, chunks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("embedder", "job"), [(Instant(), JOB), (InstantChunks(), CHUNKED)], ids=["", "chunks"]
)
def test_memory_does_not_grow_with_the_rows(tmp_path, embedder, job):
    count, characters = 100_000, 300
    part = PartFile(tmp_path / "v.npy", job)
    many = (Row(number, number + 1, f"{number:{characters}}") for number in range(count))
    patient = Patient(embedder, 10)
    tracemalloc.start()
    run(many, patient, part, chunk_rows=256, in_flight=4, on_chunk=lambda _chunk: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.texts == count
    part.close()
    PartFile(tmp_path / "v.npy", job).close()
    assert peak < count * characters / 10


@pytest.mark.process
@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("precision", ["float16", "ubinary"])
def test_another_number_format(service, oracle, tmp_path, ending, precision):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / f"vectors.{ending}"
    texts = write_corpus(corpus, 20)
    with corpus.open("a") as file:
        file.write('{"text": null}\n')
    run = Run(corpus, "-o", output, "--url", service.url, "--precision", precision)
    assert run.wait() == 3, run.said
    if ending == "npy":
        found = np.load(output)[:20]
    else:
        table = parquet.read_table(output).to_pylist() if ending == "parquet" else read_lines(output)
        assert table[20]["embedding"] is None
        found = np.array([row["embedding"] for row in table[:20]])
    vectors = oracle.encode(texts, normalize_embeddings=True)
    if precision == "float16":
        assert np.abs(found.astype(np.float32) - vectors).max() < 1e-3
    else:
        expected = quantize_embeddings(vectors, precision=precision)
        differing = np.unpackbits(found.astype(np.uint8) ^ expected).sum()
        # A number next to 0 may have either sign.
        assert differing <= 2
    if ending == "npy":
        assert np.load(output).dtype == {"float16": np.float16, "ubinary": np.uint8}[precision]


@pytest.mark.process
@pytest.mark.parametrize("here", [False, True], ids=["service", "in this process"])
def test_a_prompt(service, oracle, tmp_path, here):
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "vectors.npy"
    texts = write_corpus(corpus, 5)
    run = Run(corpus, "-o", output, "--prompt", "find: ", *([] if here else ["--url", service.url]))
    assert run.wait() == 0, run.said
    expected = oracle.encode(texts, prompt="find: ", normalize_embeddings=True)
    assert np.abs(np.load(output) - expected).max() < 1e-5


def read_lines(output: Path) -> list[dict]:
    """The rows of a .jsonl."""
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.process
def test_int8_without_ranges_does_not_start(service, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    write_corpus(corpus, 3)
    run = Run(corpus, "-o", tmp_path / "vectors.npy", "--url", service.url, "--precision", "int8")
    assert run.wait() == 2
    assert "--precision int8 needs the setting INT8_RANGES" in run.said
    assert not (tmp_path / "vectors.npy").exists()


@pytest.mark.process
def test_ranges_of_another_model_are_rejected(service, tmp_path):
    ranges, corpus = tmp_path / "ranges.json", tmp_path / "corpus.jsonl"
    numbers = {"minimum": [-1.0] * 384, "maximum": [1.0] * 384}
    ranges.write_text(json.dumps({"fingerprint": "another"} | numbers))
    write_corpus(corpus, 3)
    arguments = (corpus, "-o", tmp_path / "vectors.npy", "--url", service.url, "--precision", "int8")
    run = Run(*arguments, INT8_RANGES=str(ranges))
    assert run.wait() == 2
    assert "was calibrated with another model" in run.said
    own = requests.get(f"{service.url}/info", timeout=10).json()["fingerprint"]
    ranges.write_text(json.dumps({"fingerprint": own} | numbers))
    run = Run(*arguments, INT8_RANGES=str(ranges))
    assert run.wait() == 0, run.said
    assert np.load(tmp_path / "vectors.npy").dtype == np.int8


@pytest.mark.process
@pytest.mark.parametrize("here", [True, False], ids=["here", "at a service"])
def test_over_long_texts_become_the_mean_of_their_pieces(service, tmp_path, here):
    long = " ".join(f"word{number % 100} and more" for number in range(400))
    (tmp_path / "corpus.txt").write_text(f"{long}\nshort\n")
    output = tmp_path / "vectors.npy"
    where = [] if here else ["--url", service.url]
    run = Run(tmp_path / "corpus.txt", "-o", output, "--overflow", "mean", *where)
    assert run.wait() == 0, run.said
    body = {"texts": [long, "short"], "overflow": "mean"}
    answer = requests.post(f"{service.url}/embed", json=body, timeout=60).json()
    assert answer["usage"]["chunks"] > 2
    assert np.abs(np.load(output) - np.array(answer["embeddings"])).max() < 1e-5
