"""examples/ray_bulk.py on a local Ray resumes after a kill and embeds nothing twice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.service import ROOT, wait_until

ROWS, BATCH = 1500, 100
TEXTS = [f"sentence number {index} of a corpus, " + "and more words of it " * 8 for index in range(ROWS)]


@pytest.mark.nightly
def test_resumes_after_a_kill_and_embeds_nothing_twice(tmp_path: Path, oracle) -> None:
    corpus, vectors = tmp_path / "corpus", tmp_path / "vectors"
    corpus.mkdir()
    pq.write_table(pa.table({"id": range(ROWS), "text": TEXTS}), corpus / "corpus.parquet")

    first = begin(corpus, vectors, tmp_path / "first.log")
    try:
        wait_until(
            lambda: first.poll() is not None or len(finished(vectors)) >= 3, "three finished files", 300
        )
        assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
    finally:
        kill_with_children(first)
    done_before = {path: path.stat().st_mtime_ns for path in finished(vectors)}
    rows_before = sum(pq.read_metadata(path).num_rows for path in done_before)
    assert 0 < rows_before < ROWS

    second = begin(corpus, vectors, tmp_path / "second.log")
    try:
        assert second.wait(300) == 0, (tmp_path / "second.log").read_text()[-3000:]
    finally:
        kill_with_children(second)
    assert done_before == {path: path.stat().st_mtime_ns for path in done_before}
    table = pq.read_table(vectors).sort_by("id")
    assert table["id"].to_pylist() == list(range(ROWS)), "each row once"
    found = np.array(table["embedding"].to_pylist())
    assert abs(found - oracle.encode(TEXTS, normalize_embeddings=True)).max() < 1e-5
    print(f"{rows_before} of {ROWS} rows before the kill, the others after it")


def begin(corpus: Path, vectors: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "examples/ray_bulk.py", str(corpus), str(vectors), "--batch", str(BATCH)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def finished(vectors: Path) -> list[Path]:
    """The files of vectors that Ray has recorded as complete; a kill may leave a partial one as well."""
    notes = Path(f"{vectors}.done").glob("*.parquet")
    stems = [note.stem for note in notes if not note.stem.endswith(".pending")]
    return sorted(path for stem in stems for path in vectors.glob(f"{stem}*"))


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kill Ray's own processes as well, as if the machine were lost."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [psutil.Process(process.pid), *family]:
            member.kill()
        psutil.wait_procs(family, timeout=60)
    process.wait()
