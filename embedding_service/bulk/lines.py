"""Rows of .txt and .jsonl files, one per line: row i is line i + 1, even if it is blank or invalid."""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from embedding_service.bulk.rows import MAX_BYTES, TOO_LONG, Row, make_row


def read(file: BinaryIO, parse: Callable[[bytes], str]) -> Iterator[Row]:
    """A row for each line; `parse` finds its text."""
    for number, line in enumerate(_lines(file)):
        if line is None:
            yield Row(number, number + 1, error=f"the line is {TOO_LONG}")
        else:
            yield make_row(number, number + 1, parse, line)


def count(file: BinaryIO) -> int:
    """How many lines there are."""
    lines, last = 0, b"\n"
    while block := file.read(1 << 20):
        lines += block.count(b"\n")
        last = block[-1:]
    return lines + (last != b"\n")


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines without their line endings; None for one that is too long."""
    while line := file.readline(MAX_BYTES):
        if not line.endswith(b"\n") and len(line) == MAX_BYTES:
            while (more := file.readline(MAX_BYTES)) and not more.endswith(b"\n"):
                pass
            yield None
        else:
            yield line.removesuffix(b"\n").removesuffix(b"\r")
