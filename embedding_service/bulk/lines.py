"""Reads rows from .txt and .jsonl files: row i is line i + 1, even if it is blank or invalid.

A line ends in LF, CR LF or CR alone, as in .csv.
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from embedding_service.bulk.rows import MAX_BYTES, TOO_LONG, Row, line_ends, make_row

BLOCK_BYTES = 1 << 18


def read(file: BinaryIO, parse: Callable[[bytes], str]) -> Iterator[Row]:
    """Yield a row for each line; `parse` extracts its text."""
    for number, line in enumerate(_lines(file)):
        if len(line) >= MAX_BYTES:
            yield Row(number, number + 1, error=f"the line is {TOO_LONG}")
        else:
            yield make_row(number, number + 1, parse, line)


def count(file: BinaryIO) -> int:
    """The number of lines."""
    lines, last = 0, b""
    while block := file.read(1 << 20):
        # A CR LF over two blocks is one end of a line.
        lines += line_ends(last + block) - line_ends(last)
        last = block[-1:]
    return lines + (last not in (b"", b"\n", b"\r"))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines without their ends; of a line that is too long, only as much as shows that."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        lines = (rest + block).splitlines(keepends=True)
        # The last line may go on, and a CR at the end may be half of a CR LF.
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        for line in lines:
            yield line.rstrip(b"\r\n")
        if len(rest) > MAX_BYTES:
            rest = rest[:MAX_BYTES] + rest[-1:]
    if rest:
        yield rest.rstrip(b"\r\n")
