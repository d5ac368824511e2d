"""The input: which file it is, and in which format its rows are."""

import codecs
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from embedding_service.bulk import lines, records
from embedding_service.bulk.rows import Row, decode, json_text
from embedding_service.errors import StartupError


class Format(msgspec.Struct, frozen=True):
    """How rows are read with a field and a delimiter, and counted if there is a faster way."""

    read: Callable[[io.BufferedReader, str, str], Iterator[Row]]
    count: Callable[[io.BufferedReader], int] | None = None
    delimiter: str = ""


_JSONL = Format(lambda file, field, _: lines.read(file, json_text(field)), lines.count)

FORMATS = {
    "jsonl": _JSONL,
    "ndjson": _JSONL,
    "txt": Format(lambda file, _field, _: lines.read(file, decode), lines.count),
    "csv": Format(records.read, delimiter=","),
}

ENDINGS = ", ".join(f".{name}" for name in FORMATS)


class Source:
    """The rows of a file."""

    def __init__(self, path: Path, field: str) -> None:
        """Raises StartupError if it is not a file with rows, and OSError if it cannot be read."""
        if not path.is_file():
            raise StartupError(f"{path} is not a file")
        format = FORMATS.get(path.suffix.lower().removeprefix("."))
        if format is None:
            raise StartupError(f"{path}: the input must end in {ENDINGS}")
        self._path = path
        self._format = format
        self._field = field
        self.stat = path.stat()

    def rows(self) -> Iterator[Row]:
        """The rows, one at a time. Raises StartupError if the input cannot be read as rows."""
        with self._open() as file:
            try:
                yield from self._format.read(file, self._field, self._format.delimiter)
            except StartupError as error:
                raise StartupError(f"{self._path}: {error}") from None

    def count(self) -> int:
        """How many rows there are."""
        if self._format.count is None:
            return sum(1 for _ in self.rows())
        with self._open() as file:
            return self._format.count(file)

    def identify(self) -> tuple[int, str]:
        """Size and hash: two inputs with the same ones are the same."""
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest

    def has_changed(self, identity: tuple[int, str]) -> bool:
        """Whether the file is another than the one identified."""
        now = self._path.stat()
        same = (now.st_size, now.st_mtime_ns) == (self.stat.st_size, self.stat.st_mtime_ns)
        return not same and self.identify() != identity

    def _open(self) -> io.BufferedReader:
        file = self._path.open("rb")
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.seek(len(codecs.BOM_UTF8), os.SEEK_CUR)
        return file
