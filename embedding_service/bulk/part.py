"""The unfinished output. Vectors are appended to it, so that a run killed at any moment can resume."""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from embedding_service.bulk.paths import chunks_path, errors_path, job_path, new_path, part_path
from embedding_service.bulk.rows import Row
from embedding_service.engine import Vectors
from embedding_service.errors import StartupError


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a run computes, and from what. A run resumes only a part that has the same job."""

    input_bytes: int
    input_hash: str
    format: str
    delimiter: str
    field: str
    model: str
    fingerprint: str
    dimension: int
    input_type: str | None
    dimensions: int | None
    overflow: str | None = None
    chunk_overlap: int | None = None
    prompt_name: str | None = None
    prompt: str | None = None


# How error messages describe each compared field.
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

    def __init__(self, output: Path, job: RunRecord, *, restart: bool = False) -> None:
        """Begin or resume. Raises StartupError if the existing part belongs to a different job."""
        self.path = part_path(output)
        self.job_path = job_path(output)
        self.errors_path = errors_path(output)
        self.chunks_path = chunks_path(output)
        self.has_chunks = job.overflow == "chunks"
        self.job = job
        self._file = _claim(self.path)
        try:
            if restart:
                self._file = _begin_again(self._file, self.path)
            if self.path.stat().st_size:
                self._require_same(job)
            else:
                self._begin(job, restart)
        except BaseException:
            self._file.close()
            raise
        self.rows, self.texts = self._recover()
        self.failures = self._recover_errors()
        self._errors = self.errors_path.open("ab") if self.failures else None
        self._places = self.chunks_path.open("ab") if self.has_chunks else None

    def append(self, vectors: Vectors, bad: list[Row], places: list[Place]) -> None:
        """Add the next rows, all those of each text; a bad row's vector is NaN."""
        if bad:
            self._errors = self._errors or self.errors_path.open("ab")
            for row in bad:
                failure = BadRow(row.number, row.line, row.error)
                self._errors.write(msgspec.json.encode(failure) + b"\n")
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
        self._file.write(_header(self.rows, self.job.dimension))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Close the files, keeping their contents for the next run."""
        for file in (self._file, self._errors, self._places):
            if file is not None:
                file.close()

    def _begin(self, job: RunRecord, restart: bool) -> None:
        if self.job_path.exists() and _read_job(self.job_path) is None and not restart:
            self.path.unlink()
            raise StartupError(f"{self.job_path} was not written by a run; --restart replaces it")
        self.errors_path.unlink(missing_ok=True)
        self.chunks_path.unlink(missing_ok=True)
        _write_whole(self.job_path, msgspec.json.encode(job))

    def _require_same(self, job: RunRecord) -> None:
        begun = _read_job(self.job_path)
        if begun is None:
            raise StartupError(f"{self.path} is not a run that can be resumed; --restart replaces it")
        differing = _differing(begun, msgspec.to_builtins(job))
        if differing:
            raise StartupError(f"{self.path} was started with {'; '.join(differing)}; --restart starts over")

    def _recover(self) -> tuple[int, int]:
        """Drop rows and texts that were not written completely; returns how many rows and texts are left."""
        header = _header(0, self.job.dimension)
        self._file.seek(0, os.SEEK_END)
        size = self._file.tell()
        if size < len(header):
            self._file.seek(0)
            self._file.write(header)
            size = len(header)
        row_bytes = 4 * self.job.dimension
        rows = (size - len(header)) // row_bytes
        rows, texts = self._recover_places(rows) if self.has_chunks else (rows, rows)
        self._file.truncate(len(header) + rows * row_bytes)
        self._file.seek(0, os.SEEK_END)
        return rows, texts

    def _recover_places(self, rows: int) -> tuple[int, int]:
        """Drop the places past the last text whose rows were all written; count those rows and texts."""
        count = end = whole_rows = whole_end = texts = 0
        row = None
        with self.chunks_path.open("a+b") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                place = msgspec.json.decode(line, type=Place)
                if place.row != row:
                    row = place.row
                    whole_rows, whole_end, texts = count, end, row
                if count == rows:
                    break
                count, end = count + 1, end + len(line)
            else:
                # Fewer places than rows are left only if the machine itself failed.
                if row is not None and count == rows:
                    whole_rows, whole_end, texts = count, end, row + 1
            file.truncate(whole_end)
        return whole_rows, texts

    def _recover_errors(self) -> int:
        """Drop the errors of texts that were not written, and count the rest."""
        if not self.errors_path.exists():
            return 0
        kept, end = 0, 0
        with self.errors_path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n") or msgspec.json.decode(line, type=BadRow).row >= self.texts:
                    break
                kept, end = kept + 1, end + len(line)
            file.truncate(end)
        if not kept:
            self.errors_path.unlink()
        return kept


def _header(rows: int, dimension: int) -> bytes:
    """The .npy header; numpy pads it, so its length does not depend on `rows`."""
    buffer = io.BytesIO()
    fields: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _read_job(path: Path) -> dict[str, Any] | None:
    """The job that a run began with; None if the file is missing or invalid."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _differing(begun: dict[str, Any], job: dict[str, Any]) -> list[str]:
    """Describe each differing field, with its old and new values."""
    if begun.get("fingerprint") != job["fingerprint"] and begun.get("model") != job["model"]:
        return [f"the model {_shown(begun.get('model'))}, now {_shown(job['model'])}"]
    return [
        f"{words} {_shown(begun.get(name))}, now {_shown(job[name])}"
        for name, words in _COMPARED.items()
        if begun.get(name) != job[name]
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value)[:60]


def _write_whole(path: Path, content: bytes) -> None:
    new = new_path(path)
    new.write_bytes(content)
    new.replace(path)


def _claim(path: Path) -> BinaryIO:
    """Open or create the part, locked for this run."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
    _lock(file, path)
    # Another run may have finished in the meantime and renamed this file: it is now that run's output.
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        file.close()
        raise StartupError(f"another run has just finished {path}")
    return file


def _begin_again(claimed: BinaryIO, path: Path) -> BinaryIO:
    """Replace the old part with a new one; other hard links to the old one keep its content."""
    with claimed:
        path.unlink()
        return _claim(path)


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock out other runs. The lock is released when the process ends, even if it is killed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StartupError(f"another run is writing {path}") from None
