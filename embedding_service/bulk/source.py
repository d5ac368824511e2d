"""The input: a file or standard input, its format, and whether it has changed."""

import codecs
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import msgspec

from embedding_service.bulk import columns, compression, elements, lines, records
from embedding_service.bulk.rows import Row, decode, json_text
from embedding_service.errors import StartupError

# If all of this many rows at the start are bad, the options are probably wrong, not the rows.
HEAD_ROWS = 100

# How much of a file shows its encoding.
HEAD_BYTES = 512


class Format(msgspec.Struct, frozen=True):
    """How to read rows, given a field and a delimiter, and how to count them if that is faster."""

    read: Callable[[io.BufferedReader, str, str], Iterator[Row]]
    count: Callable[[io.BufferedReader], int] | None = None
    delimiter: str = ""


_JSONL = Format(lambda file, field, _: lines.read(file, json_text(field)), lines.count)

FORMATS = {
    "jsonl": _JSONL,
    "ndjson": _JSONL,
    "txt": Format(lambda file, _field, _: lines.read(file, decode), lines.count),
    "csv": Format(records.read, delimiter=","),
    "tsv": Format(records.read, delimiter="\t"),
    "json": Format(lambda file, field, _: elements.read(file, json_text(field))),
    "parquet": Format(lambda file, field, _: columns.read(file, field), columns.count),
}


class InputFile:
    """The rows of a file, or of a stream (standard input or a pipe), which can be read only once."""

    def __init__(
        self, path: Path, field: str, format: str | None = None, delimiter: str | None = None
    ) -> None:
        """Raises StartupError if the file or format does not exist, and OSError if it cannot be read."""
        self._path = path
        self.name = "standard input" if path == Path("-") else str(path)
        self.stat = self._stat()
        if stat.S_ISDIR(self.stat.st_mode):
            raise StartupError(f"{path} is a folder")
        self.is_stream = path == Path("-") or not stat.S_ISREG(self.stat.st_mode)
        self.format = format or self._format_of_name()
        self._format = FORMATS[self.format]
        self._field = field
        self.delimiter = self._format.delimiter if delimiter is None else _delimiter(delimiter)
        if delimiter is not None and not self._format.delimiter:
            raise StartupError(f"--delimiter is for csv and tsv; {self.name} is read as {self.format}")

    def rows(self) -> Iterator[Row]:
        """The rows, one at a time. Raises StartupError if the input cannot be read as rows."""
        with self._open() as file:
            yield from self._format.read(file, self._field, self.delimiter)

    def count(self) -> int | None:
        """The number of rows; None for a stream."""
        if self.is_stream:
            return None
        if self._format.count is None:
            return sum(1 for _ in self.rows())
        with self._open() as file:
            return self._format.count(file)

    def identify(self) -> tuple[int, str]:
        """The size and hash of the content."""
        if self.is_stream:
            return 0, self.name
        with self._path.open("rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        if self._looks_changed():
            raise StartupError(f"{self.name} is still being written")
        return size, digest

    def has_changed(self, identity: tuple[int, str]) -> bool:
        """Whether the file differs from the one identified."""
        if self.is_stream or not self._looks_changed():
            return False
        self.stat = self._stat()
        return self.identify() != identity

    def _looks_changed(self) -> bool:
        now, then = self._stat(), self.stat
        return (now.st_ino, now.st_size, now.st_mtime_ns) != (then.st_ino, then.st_size, then.st_mtime_ns)

    def _stat(self) -> os.stat_result:
        try:
            return os.fstat(0) if self._path == Path("-") else self._path.stat()
        except FileNotFoundError:
            raise StartupError(f"{self._path} is not a file") from None

    def _format_of_name(self) -> str:
        name = Path(self._path.name.lower())
        if name.suffix in compression.ENDINGS:
            name = name.with_suffix("")
        format = name.suffix.removeprefix(".")
        if format in FORMATS:
            return format
        if self.is_stream:
            return "jsonl"
        raise StartupError(
            f"{self._path}: the input must end in {', '.join(f'.{known}' for known in FORMATS)}, "
            "optionally followed by .gz or .zst; or give its --format"
        )

    @contextmanager
    def _open(self) -> Iterator[io.BufferedReader]:
        """The decompressed bytes, without a byte order mark. Errors name the input."""
        with open(0, "rb", closefd=False) if self._path == Path("-") else self._path.open("rb") as raw:
            try:
                file = compression.decompressed(raw)
                head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
                if self.format != "parquet" and _is_utf16(head):
                    raise StartupError("it is UTF-16; only UTF-8 is supported")
                if head.startswith(codecs.BOM_UTF8):
                    file.read(len(codecs.BOM_UTF8))
                yield file
            except StartupError as error:
                raise StartupError(f"{self.name}: {error}") from None
            except compression.DAMAGED as error:
                raise StartupError(f"{self.name} is damaged: {error}") from None


def require_texts(rows: Iterator[Row]) -> Iterator[Row]:
    """Return the rows. Raises StartupError if the first HEAD_ROWS, or all if there are fewer, are bad."""
    head = []
    for row in islice(rows, HEAD_ROWS):
        head.append(row)
        if not row.error:
            break
    else:
        if head:
            errors = list(dict.fromkeys(row.error for row in head))
            first = errors[0] + ("; …" if len(errors) > 1 else "")
            where = f"none of the first {len(head)} rows has a text (--field, --format)"
            raise StartupError(f"{where}; line {head[0].line}: {first}")
    return chain(head, rows)


def _is_utf16(head: bytes) -> bool:
    """Whether there is a byte order mark, or most bytes at even or else odd places are zero."""
    even, odd = (2 * head[first::2].count(0) > len(head[first::2]) for first in (0, 1))
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (even != odd and len(head) > 1)


def _delimiter(given: str) -> str:
    delimiter = "\t" if given in ("\\t", "tab") else given
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise StartupError(f"--delimiter {given!r} must be one character, and no quote or line break")
    return delimiter
