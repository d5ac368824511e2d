"""The unfinished output: vectors that grow in place, so that a run killed at any moment can go on."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from embedding_service.bulk.rows import Row
from embedding_service.engine import Vectors
from embedding_service.errors import StartupError

HASHED_BYTES = 1 << 16


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What makes two runs the same work: a run goes on only with what an equal one began."""

    input_bytes: int
    input_hash: str
    field: str
    fingerprint: str
    dimension: int
    input_type: str | None
    dimensions: int | None


class Failure(msgspec.Struct, frozen=True):
    """A bad row as it stands in the errors file."""

    row: int
    line: int
    error: str


class Part:
    """`OUTPUT.part`, a .npy file with one row for each row of the input, and the bad rows beside it.

    What has been done is read from the files themselves: complete rows of vectors count, a torn one
    does not. The errors of a chunk are written before its vectors, so none is ever missing.
    """

    def __init__(self, output: Path, job: Job) -> None:
        """Begin, or go on. Raises StartupError where what was begun is other work."""
        self.path = part_path(output)
        self.job_path = output.with_name(f"{output.name}.part.json")
        self.errors_path = errors_path(output)
        self._dimension = job.dimension
        if self.path.exists() and self.job_path.exists():
            self._require_same(job)
        else:
            self.path.unlink(missing_ok=True)
            self.errors_path.unlink(missing_ok=True)
            _write_whole(self.job_path, msgspec.json.encode(job))
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        _lock(self._file, self.path)
        self.rows = self._recover()
        self.failures = self._recover_errors()
        self._errors = self.errors_path.open("ab") if self.failures else None

    def append(self, vectors: Vectors, bad: list[Row]) -> None:
        """Add the next rows; a bad row's vector is NaN."""
        if bad:
            self._errors = self._errors or self.errors_path.open("ab")
            for row in bad:
                failure = Failure(row.number, row.line, row.error)
                self._errors.write(msgspec.json.encode(failure) + b"\n")
            self._errors.flush()
            self.failures += len(bad)
        self._file.write(np.ascontiguousarray(vectors, np.float32).data)
        self._file.flush()
        self.rows += len(vectors)

    def seal(self) -> None:
        """Write the header that says how many rows there are, and put everything on the disk."""
        self._file.seek(0)
        self._file.write(_header(self.rows, self._dimension))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Close the files; what is in them stays for the next run."""
        self._file.close()
        if self._errors is not None:
            self._errors.close()

    def _require_same(self, job: Job) -> None:
        begun = msgspec.json.decode(self.job_path.read_bytes())
        differing = [name for name, value in msgspec.to_builtins(job).items() if begun.get(name) != value]
        if differing:
            raise StartupError(
                f"{self.path} was begun with another {', '.join(differing)}; "
                "--restart throws it away and begins again"
            )

    def _recover(self) -> int:
        header = _header(0, self._dimension)
        self._file.seek(0, os.SEEK_END)
        size = self._file.tell()
        if size < len(header):
            self._file.seek(0)
            self._file.write(header)
            size = len(header)
        row_bytes = 4 * self._dimension
        rows = (size - len(header)) // row_bytes
        self._file.truncate(len(header) + rows * row_bytes)
        self._file.seek(0, os.SEEK_END)
        return rows

    def _recover_errors(self) -> int:
        """Drop the errors of rows that were not written, and count the rest."""
        if not self.errors_path.exists():
            return 0
        kept, end = 0, 0
        with self.errors_path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n") or msgspec.json.decode(line, type=Failure).row >= self.rows:
                    break
                kept, end = kept + 1, end + len(line)
            file.truncate(end)
        if not kept:
            self.errors_path.unlink()
        return kept


def part_path(output: Path) -> Path:
    """Where the vectors of an unfinished output stand."""
    return output.with_name(f"{output.name}.part")


def errors_path(output: Path) -> Path:
    """Where the bad rows of an output stand, one JSON object a line."""
    return output.with_name(f"{output.name}.errors.jsonl")


def discard(output: Path) -> None:
    """Throw away what an earlier run began."""
    for suffix in (".part", ".part.json"):
        output.with_name(output.name + suffix).unlink(missing_ok=True)


def identify(path: Path) -> tuple[int, str]:
    """Size of a file, and a hash of its beginning and end: enough to notice another file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for position in (0, max(0, size - HASHED_BYTES)):
            file.seek(position)
            digest.update(file.read(HASHED_BYTES))
    return size, digest.hexdigest()


def _header(rows: int, dimension: int) -> bytes:
    """The .npy header; numpy leaves room in it, so that its length does not depend on `rows`."""
    buffer = io.BytesIO()
    what: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(buffer, what)
    return buffer.getvalue()


def _write_whole(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second run out; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StartupError(f"another run is writing {path}") from None
