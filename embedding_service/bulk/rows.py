"""Reading the input: a .jsonl, .txt or .csv file as numbered rows, one at a time."""

import codecs
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from embedding_service.errors import StartupError

# A line longer than this is a bad row, so that a file without line breaks does not fill the memory.
MAX_LINE_BYTES = 16 << 20


ENDINGS = (".jsonl", ".ndjson", ".txt", ".csv")


class Row(msgspec.Struct, frozen=True):
    """Row `number` (from 0), beginning on `line` (from 1): a text, or what is wrong with it."""

    number: int
    line: int
    text: str = ""
    error: str = ""


class BadRow(ValueError):
    """A row that holds no text; the message says why."""


def read(path: Path, field: str, first: int = 0) -> Iterator[Row]:
    """The rows from number `first` on. Raises StartupError where the file cannot be read as rows.

    In .jsonl and .txt row i is line i + 1, whatever stands there; in .csv it is record i after the header.
    """
    if path.suffix.lower() == ".csv":
        yield from _read_csv(path, field, first)
        return
    parse = _json_text(field) if path.suffix.lower() in (".jsonl", ".ndjson") else _decode
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file)):
            if number < first:
                continue
            if line is None:
                yield Row(number, number + 1, error=f"the line is longer than {MAX_LINE_BYTES} bytes")
            else:
                yield _row(number, number + 1, parse, line)


def count(path: Path, field: str) -> int:
    """How many rows there are."""
    if path.suffix.lower() == ".csv":
        return sum(1 for _ in _read_csv(path, field, 0))
    rows, last = 0, b"\n"
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            rows += block.count(b"\n")
            last = block[-1:]
    return rows + (last != b"\n")


def _row(number: int, line: int, parse: Callable[[Any], str], raw: Any) -> Row:
    try:
        return Row(number, line, text=parse(raw))
    except BadRow as error:
        return Row(number, line, error=str(error))


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines without their ends; None for one that is too long."""
    is_first = True
    while line := file.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
            while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                pass
            yield None
        else:
            line = line.removeprefix(codecs.BOM_UTF8) if is_first else line
            yield line.removesuffix(b"\n").removesuffix(b"\r")
        is_first = False


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start}") from None


def _json_text(field: str) -> Callable[[bytes], str]:
    def parse(line: bytes) -> str:
        if not line.strip():
            raise BadRow("the line is blank")
        try:
            value = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRow(f"not valid JSON: {error}") from None
        if isinstance(value, dict):
            if field not in value:
                raise BadRow(f"the object has no field {field!r}")
            value = value[field]
        if not isinstance(value, str):
            raise BadRow(f"{field!r} is not a string but {type(value).__name__}")
        return _encodable(value)

    return parse


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("the text is not valid Unicode") from None
    return text


def _read_csv(path: Path, field: str, first: int) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Bytes that are not UTF-8 become surrogates here, and a bad row where they are looked at.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = csv.reader(file)
        header = next(records, [])
        if field not in header:
            raise StartupError(f"{path} has no column {field!r}; its header is {', '.join(header)}")
        column = header.index(field)

        def parse(record: list[str] | csv.Error) -> str:
            if isinstance(record, csv.Error):
                raise BadRow(str(record))
            if column >= len(record):
                raise BadRow(f"the record has no column {field!r}")
            return _encodable(record[column])

        for number, (line, record) in enumerate(_records(records)):
            if number >= first:
                yield _row(number, line, parse, record)


def _records(records: Any) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Each record that is not blank, or why there is none, and the line on which it begins."""
    while True:
        line = records.line_num + 1
        try:
            record: list[str] | csv.Error = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            record = error
        if record != []:
            yield line, record
