"""The unfinished output. Vectors are appended to it, so that a run killed at any moment can resume."""

import io
import os
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from embedding_service.bulk.paths import Paths, new_path
from embedding_service.bulk.rows import Row
from embedding_service.engine import Vectors
from embedding_service.errors import StartupError

# What a run computes, and from what, by name; and the name of its model.
Job = dict[str, Any]

# A run resumes only a part whose job has the same values of these. How error messages describe each:
_COMPARED = {
    "input_bytes": "an input of this many bytes:",
    "input_hash": "an input with the hash",
    "format": "--format",
    "delimiter": "--delimiter",
    "field": "--field",
    "fingerprint": "a model with the fingerprint",
    "dimension": "vectors of length",
    "input_type": "--input-type",
    "dimensions": "--dimensions",
    "overflow": "--overflow",
    "chunk_overlap": "--chunk-overlap",
    "prompt_name": "--prompt-name",
    "prompt": "--prompt",
}


class BadRow(msgspec.Struct, frozen=True):
    """A bad row, as recorded in the errors file."""

    row: int
    line: int
    error: str


class Place(msgspec.Struct, frozen=True):
    """The input row of a vector and, for a chunk, its characters from `start` to just before `end`."""

    row: int
    start: int | None = None
    end: int | None = None


class PartFile:
    """`OUTPUT.part`, a .npy file with one row per text or chunk, and the list of bad rows beside it.

    The files themselves are the record of progress: complete rows count, a partly written one does
    not. Errors and places are written before their vectors, so none is ever lost.

    With `--overflow chunks`, `OUTPUT.chunks.jsonl` holds the place of each row. Every text has at least
    one, even a bad text, so the places also show how many texts are complete.
    """

    def __init__(self, output: Path, job: Job, *, restart: bool = False) -> None:
        """Begin or resume. Raises StartupError if the existing part belongs to a different job."""
        self.paths = Paths(output)
        self.job = job
        self.has_chunks = job.get("overflow") == "chunks"
        self._file = _claim(self.paths.part)
        try:
            if restart:
                # Replaced, since other hard links to the old part keep its content.
                with self._file:
                    self.paths.part.unlink()
                    self._file = _claim(self.paths.part)
            self._begin_or_check(restart)
        except BaseException:
            self._file.close()
            raise
        self.rows, self.texts = self._recover()
        self.failures = _drop_from(self.paths.errors, self.texts)
        if not self.failures:
            self.paths.errors.unlink()
        self._errors = self.paths.errors.open("ab") if self.failures else None
        self._places = self.paths.chunks.open("ab") if self.has_chunks else None

    def append(self, vectors: Vectors, bad: list[Row], places: list[Place]) -> None:
        """Add the next rows, all those of each text; a bad row's vector is NaN."""
        if bad:
            self._errors = self._errors or self.paths.errors.open("ab")
            failures = [BadRow(row.number, row.line, row.error) for row in bad]
            self._errors.write(msgspec.json.Encoder().encode_lines(failures))
            self._errors.flush()
            self.failures += len(bad)
        if self._places is not None:
            self._places.write(msgspec.json.Encoder().encode_lines(places))
            self._places.flush()
        self._file.write(np.ascontiguousarray(vectors, np.float32).data)
        self._file.flush()
        self.rows += len(vectors)
        self.texts = places[-1].row + 1

    def seal(self) -> None:
        """Write the header with the final number of rows, and sync to disk."""
        self._file.seek(0)
        self._file.write(_header(self.rows, self.job["dimension"]))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Close the files, keeping their contents for the next run."""
        for file in (self._file, self._errors, self._places):
            if file is not None:
                file.close()

    def _begin_or_check(self, restart: bool) -> None:
        paths, begun = self.paths, _read_job(self.paths.job)
        if paths.part.stat().st_size:
            if begun is None:
                raise StartupError(f"{paths.part} is not a run that can be resumed; --restart replaces it")
            if differing := _differing(begun, self.job):
                raise StartupError(
                    f"{paths.part} was started with {'; '.join(differing)}; --restart starts over"
                )
            return
        if paths.job.exists() and begun is None and not restart:
            paths.part.unlink()
            raise StartupError(f"{paths.job} was not written by a run; --restart replaces it")
        paths.errors.unlink(missing_ok=True)
        paths.chunks.unlink(missing_ok=True)
        new = new_path(paths.job)
        new.write_bytes(msgspec.json.encode(self.job))
        new.replace(paths.job)

    def _recover(self) -> tuple[int, int]:
        """Drop rows and texts that were not written completely; returns how many rows and texts are left."""
        header, row_bytes = _header(0, self.job["dimension"]), 4 * self.job["dimension"]
        size = self.paths.part.stat().st_size
        if size < len(header):
            self._file.write(header)
            size = len(header)
        rows = texts = (size - len(header)) // row_bytes
        if self.has_chunks:
            texts = self._whole_texts(rows)
            rows = _drop_from(self.paths.chunks, texts)
        self._file.truncate(len(header) + rows * row_bytes)
        self._file.seek(0, os.SEEK_END)
        return rows, texts

    def _whole_texts(self, rows: int) -> int:
        """How many texts have all of their places among the first `rows`."""
        row = count = 0
        with self.paths.chunks.open("a+b") as file:
            file.seek(0)
            # The next place shows whether the text of the last one has more.
            for line in islice(file, rows + 1):
                if not line.endswith(b"\n"):
                    return row
                row, count = msgspec.json.decode(line, type=Place).row, count + 1
        # Fewer places than rows are left only if the machine itself failed.
        return row + 1 if count == rows > 0 else row


def _drop_from(path: Path, text: int) -> int:
    """Drop the lines of this and later texts, and one that is not complete; returns how many are left."""
    kept = end = 0
    with path.open("a+b") as file:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n") or msgspec.json.decode(line, type=Place).row >= text:
                break
            kept, end = kept + 1, end + len(line)
        file.truncate(end)
    return kept


def _header(rows: int, dimension: int) -> bytes:
    """The .npy header; numpy pads it, so its length does not depend on `rows`."""
    buffer = io.BytesIO()
    fields: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _read_job(path: Path) -> Job | None:
    """The job that a run began with; None if the file is missing or invalid."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Job)
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _differing(begun: Job, job: Job) -> list[str]:
    """Describe each differing field, with its old and new values."""

    def change(name: str) -> str:
        old, new = ("none" if each.get(name) is None else repr(each[name])[:60] for each in (begun, job))
        return f"{old}, now {new}"

    changed = [name for name in ("model", *_COMPARED) if begun.get(name) != job.get(name)]
    if "model" in changed and "fingerprint" in changed:
        return [f"the model {change('model')}"]
    return [f"{_COMPARED[name]} {change(name)}" for name in changed if name in _COMPARED]


def _claim(path: Path) -> BinaryIO:
    """Open or create the part, locked for this run until the process ends, even if it is killed."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows
    except OSError:
        file.close()
        raise StartupError(f"another run is writing {path}") from None
    # Another run may have finished in the meantime and renamed this file: it is now that run's output.
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        file.close()
        raise StartupError(f"another run has just finished {path}")
    return file
