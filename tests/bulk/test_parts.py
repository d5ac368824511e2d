"""The unfinished output, from which a run resumes."""

import numpy as np
import pytest

from embedding_service.bulk.part import PartFile, Place
from embedding_service.bulk.paths import Paths
from embedding_service.bulk.rows import Row
from embedding_service.errors import StartupError
from tests.bulk.running import CHUNKED, JOB


def test_a_partial_row_and_errors_without_their_rows_are_dropped(tmp_path):
    output = tmp_path / "v.npy"
    part = PartFile(output, JOB)
    part.append(np.ones((3, 2), np.float32), [Row(1, 2, error="bad")], [Place(0), Place(1), Place(2)])
    part.close()
    with part.paths.part.open("ab") as file:
        file.write(b"\0\0\0")
    with part.paths.errors.open("ab") as file:
        file.write(b'{"row":3,"line":4,"error":"of a chunk that was not written"}\n{"row":4,"li')
    again = PartFile(output, JOB)
    assert (again.rows, again.failures) == (3, 1)
    again.append(np.zeros((1, 2), np.float32), [], [Place(3)])
    again.seal()
    assert np.load(again.paths.part).tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    assert again.paths.errors.read_text().count("\n") == 1


def test_a_part_is_closed_to_other_jobs_and_to_a_second_run(tmp_path):
    output = tmp_path / "v.npy"
    part = PartFile(output, JOB)
    with pytest.raises(StartupError, match="another run is writing"):
        PartFile(output, JOB)
    part.close()
    with pytest.raises(StartupError, match="a model with the fingerprint 'f', now 'another'"):
        PartFile(output, JOB | {"fingerprint": "another"})


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
    vectors, places = part.paths.part.read_bytes(), part.paths.chunks.read_bytes()
    header = len(vectors) - 12 * 8
    cuts = range(header, len(vectors) + 1) if lost == "vectors" else range(len(places) + 1)
    for cut in cuts:
        output = tmp_path / f"{cut}.npy"
        for path, content, is_cut in (
            (Paths(output).part, vectors, lost == "vectors"),
            (Paths(output).chunks, places, lost == "places"),
            (Paths(output).job, part.paths.job.read_bytes(), False),
        ):
            path.write_bytes(content[:cut] if is_cut else content)
        again = PartFile(output, CHUNKED)
        assert again.rows == sum(n % 3 + 1 for n in range(again.texts))
        if lost == "vectors":
            written = (cut - header) // 8
            assert again.texts == max(n for n in range(7) if sum(m % 3 + 1 for m in range(n)) <= written)
        append_texts(again, again.texts, 6)
        again.close()
        assert Paths(output).part.read_bytes() == vectors
        assert Paths(output).chunks.read_bytes() == places
