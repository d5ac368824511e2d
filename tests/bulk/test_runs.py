"""A run writes every row once, whatever happens: interrupted, killed, with bad rows, or overloaded."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from embedding_service.bulk.paths import Paths
from tests.bulk.running import DIMENSION, Behind, Numbers, Run, end_midway, rows_in, write_corpus
from tests.fakes import Served
from tests.service import Service, wait_until


def interrupt_and_resume(service: Service, folder: Path, oracle, count: int, number: signal.Signals) -> Run:
    """Interrupt a run in the middle, resume it, and check the rows of the output."""
    corpus, output = folder / "corpus.jsonl", folder / "vectors.npy"
    texts = write_corpus(corpus, count)
    command = (corpus, "-o", output, "--batch", 16 if count < 10_000 else 256)
    served = Served(engine := Behind(service))
    try:
        first = end_midway(
            served.url,
            engine,
            *command,
            rows=count // 3,
            spare=count // 3,
            dimension=DIMENSION,
            number=number,
        )
        done = rows_in(output)
        second = Run(*command, "--url", served.url)
        assert second.wait(1800) == 0, second.said
    finally:
        served.stop()
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
    resumed = interrupt_and_resume(service, tmp_path, oracle, 600, number)
    assert resumed.peak_mib < 200


@pytest.mark.long
def test_100_000_lines_with_a_kill_in_the_middle(service, oracle, tmp_path, record_property):
    began = time.monotonic()
    resumed = interrupt_and_resume(service, tmp_path, oracle, 100_000, signal.SIGKILL)
    seconds = time.monotonic() - began
    print(f"100,000 lines with a kill and a resume: {seconds:.0f} s, peak memory {resumed.peak_mib:.0f} MiB")
    record_property("peak_mib", resumed.peak_mib)
    assert resumed.peak_mib < 200


@pytest.mark.process
def test_all_of_100_000_rows_are_written_once_despite_two_kills(tmp_path):
    """Over HTTP, with a model that takes no time, so that every row can be checked."""
    count, corpus, output = 100_000, tmp_path / "corpus.txt", tmp_path / "vectors.npy"
    corpus.write_text("".join(f"{number + 1}\n" for number in range(count)))
    served = Served(engine := Numbers())
    try:
        for done in (20_000, 60_000):
            killed = end_midway(served.url, engine, corpus, "-o", output, rows=done, spare=20_000)
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
    listed = [json.loads(line) for line in Paths(output).errors.read_text().splitlines()]
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
    running = start(MAX_CONCURRENT_REQUESTS="2", LOG_LEVEL="debug").wait_ready()
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "vectors.npy"
    texts = write_corpus(corpus, 400)
    embedding = Run(corpus, "-o", output, "--url", running.url, "--batch", 16, "--in-flight", 6)
    wait_until(lambda: "429 overloaded" in running.log() or embedding.is_over(), "a refusal", 300)
    running.model_process().kill()
    assert embedding.wait() == 0, embedding.said
    assert "503 unavailable" in running.log()
    vectors = np.load(output)
    assert len(np.unique(np.round(vectors, 4), axis=0)) == len(texts)
    expected = oracle.encode(texts[::10], normalize_embeddings=True)
    assert np.abs(vectors[::10] - expected).max() < 1e-5
