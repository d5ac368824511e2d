"""Reads rows from .csv and .tsv files. Parsing is strict, and resynchronises after a quoting error."""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from typing import TextIO

import msgspec

from embedding_service.bulk.rows import MAX_BYTES, TOO_LONG, BadRow, Row, encodable, make_row, position
from embedding_service.errors import StartupError

# Excel writes and reads such a first line; it is not part of the table.
EXCEL_DELIMITER = re.compile(r"sep=(.)")


def read(file: io.BufferedReader, field: str, delimiter: str) -> Iterator[Row]:
    """Yield a row for each record after the header. Raises StartupError if there is no such column."""
    csv.field_size_limit(MAX_BYTES)
    # Bytes that are not UTF-8 become surrogates here; if they are in a text, its row is bad.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield from _rows(_Lines(text), field, delimiter)
    finally:
        # The caller closes the file.
        text.detach()


def _rows(lines: "_Lines", field: str, delimiter: str) -> Iterator[Row]:
    header = _header(lines, delimiter)
    if excel := EXCEL_DELIMITER.fullmatch(delimiter.join(header)):
        header = _header(lines, excel[1])
        delimiter = excel[1]
    column = position(header, field)

    def parse(record: list[str] | str) -> str:
        if isinstance(record, str):
            raise BadRow(record)
        if column >= len(record):
            raise BadRow(f"the record has no column {field!r}")
        return encodable(record[column])

    for number, (line, record) in enumerate(_records(lines, delimiter, len(header))):
        yield make_row(number, line, parse, record)


class _Lines:
    """The lines of a file; those that a record has consumed can be pushed back."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._pushed_back: deque[str] = deque()
        self._characters = 0
        self.taken: list[str] = []
        self.number = 0

    def begin(self) -> int:
        """Begin a record; returns its line number."""
        self.taken, self._characters = [], 0
        return self.number + 1

    def push_back(self) -> None:
        """Push back all lines of the record but the first."""
        self._pushed_back.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._pushed_back.popleft() if self._pushed_back else self._next()
        if not line:
            raise StopIteration
        self.taken.append(line)
        self.number += 1
        self._characters += len(line)
        if self._characters > MAX_BYTES:
            raise BadRow(f"the record is {TOO_LONG}")
        return line

    def _next(self) -> str:
        line = self._file.readline(MAX_BYTES)
        if len(line) == MAX_BYTES and line[-1] not in "\r\n":
            while (more := self._file.readline(MAX_BYTES)) and more[-1] not in "\r\n":
                pass
            # One character more than the limit, so that it is still too long if it is read again.
            line += "\n"
        return line


class _Fault(msgspec.Struct):
    """A record that cannot be parsed; `line` is the line on which the faulty quote opens."""

    first_line: int
    line: int
    error: str
    last_line: int

    def message(self) -> str:
        if self.last_line == self.line:
            return self.error
        return f"{self.error}; everything up to line {self.last_line} is treated as part of it"


def _header(lines: _Lines, delimiter: str) -> list[str]:
    for line, record in _records(lines, delimiter, None):
        if isinstance(record, str):
            raise StartupError(f"the header cannot be read, line {line}: {record}")
        return record
    raise StartupError("there is no header: the file is empty")


def _records(lines: _Lines, delimiter: str, width: int | None) -> Iterator[tuple[int, list[str] | str]]:
    """Yield each non-blank record, or its error, with its line number.

    After a fault, parsing resumes at the next line that begins a record of `width` fields or another fault.
    """
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    fault: _Fault | None = None
    while True:
        first = lines.begin()
        record = _record_or_fault(lines, reader, first, delimiter, None if fault else width)
        if isinstance(record, _Fault):
            lines.push_back()
            # Parsing from the record's second line may hit the same quote again.
            if fault and fault.line != record.line:
                yield fault.line, fault.message()
            fault = fault if fault and fault.line == record.line else record
        elif fault and record is not None and len(record) != width:
            lines.push_back()
            fault.last_line = max(fault.last_line, first if record else 0)
        else:
            if fault:
                # If a record begins on that line, an earlier quote caused the fault.
                yield fault.line if fault.line < first else fault.first_line, fault.message()
                fault = None
            if record is None:
                return
            if record:
                yield first, record


def _record_or_fault(
    lines: _Lines, reader: Iterator[list[str]], first: int, delimiter: str, width: int | None
) -> list[str] | _Fault | None:
    """The next record or its fault; None at the end of the file.

    A record over several lines with other than `width` fields is a fault too: an unclosed quote has
    probably swallowed the records up to the next quote.
    """
    try:
        record = next(reader, None)
    except (csv.Error, BadRow) as error:
        return _fault(lines, first, delimiter, error)
    if record is None or width in (None, len(record)) or len(lines.taken) == 1:
        return record
    fault = f"{len(lines.taken)} lines form a record of {len(record)} fields, not {width}"
    return _Fault(first, first, f"{fault}; a quote may be unclosed", first)


def _fault(lines: _Lines, first: int, delimiter: str, error: Exception) -> _Fault:
    """What is wrong with the current record, and where."""
    text, d = "".join(lines.taken), re.escape(delimiter)
    # The fields before the faulty one parse cleanly.
    intact = re.compile(rf'(?:(?:"(?:[^"]++|"")*+"|(?!")[^{d}\r\n]*+){d})*+').match(text)
    start = intact.end() if intact else 0
    line = first + len(re.findall(r"\r\n|\r|\n", text[:start]))
    if isinstance(error, BadRow):
        message = str(error)
    elif "field limit" in str(error):
        message = f"a field is {TOO_LONG}"
    elif "end of data" in str(error):
        message = "the quote that opens here is never closed"
    elif line == lines.number:
        message = "there is text after the field's closing quote"
    else:
        message = f"the quote that opens here is not closed before another on line {lines.number}"
    return _Fault(first, line, message, line)
