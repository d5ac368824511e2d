"""Reads rows from .txt and .jsonl files: row i is line i + 1, even if it is blank or invalid."""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from embedding_service.bulk.rows import MAX_BYTES, TOO_LONG, Row, make_row


def read(file: BinaryIO, parse: Callable[[bytes], str]) -> Iterator[Row]:
    """Yield a row for each line; `parse` extracts its text."""
    for number, line in enumerate(_lines(file)):
        if line is None:
            yield Row(number, number + 1, error=f"the line is {TOO_LONG}")
        else:
            yield make_row(number, number + 1, parse, line)


def count(file: BinaryIO) -> int:
    """The number of lines."""
    lines, last = 0, b"\n"
    while block := file.read(1 << 20):
        lines += block.count(b"\n")
        last = block[-1:]
    return lines + (last != b"\n")


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines without their line endings, and None for a line that is too long."""
    while line := file.readline(MAX_BYTES):
        if not line.endswith(b"\n") and len(line) == MAX_BYTES:
            while (more := file.readline(MAX_BYTES)) and not more.endswith(b"\n"):
                pass
            yield None
        else:
            yield line.removesuffix(b"\n").removesuffix(b"\r")
