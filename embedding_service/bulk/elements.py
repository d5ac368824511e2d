"""Reads rows from a .json file that holds one array, an element at a time, by matching brackets."""

import io
import re
from collections.abc import Callable, Iterator

from embedding_service.bulk.rows import MAX_BYTES, TOO_LONG, Row, line_ends, make_row
from embedding_service.errors import StartupError

BLOCK_BYTES = 1 << 18

# A complete string, a bracket or a comma. A lone quote opens a string whose end has not been read yet.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)


def read(file: io.BufferedReader, parse: Callable[[bytes], str]) -> Iterator[Row]:
    """Yield a row for each element. Raises StartupError if there is no array or it is not closed."""
    line = _skip_to_array(file)
    for number, raw in enumerate(_elements(file)):
        text = raw.lstrip()
        first_line = line + line_ends(raw[: len(raw) - len(text)])
        line += line_ends(raw)
        yield make_row(number, first_line, parse, text)


def _skip_to_array(file: io.BufferedReader) -> int:
    """Read past the array's opening bracket; returns its line number."""
    line = 1
    while byte := file.read(1):
        if byte == b"[":
            return line
        if byte.strip():
            raise StartupError("it is not a JSON array; for one object per line use --format jsonl")
        line += byte == b"\n"
    raise StartupError("the file is empty")


def _elements(file: io.BufferedReader) -> Iterator[bytes]:
    """Yield the bytes of each element, with surrounding whitespace."""
    buffer, scanned, depth, is_first = b"", 0, 0, True
    while block := file.read(BLOCK_BYTES):
        buffer += block
        start = 0
        for token in _TOKEN.finditer(buffer, scanned):
            kind = token[0]
            scanned = token.end() if kind != b'"' else token.start()
            if kind in (b"[", b"{"):
                depth += 1
            elif kind in (b"]", b"}"):
                depth -= 1
            if depth < 0 or (kind == b"," and depth == 0):
                element = buffer[start : token.start()]
                # An empty array has no elements.
                if depth == 0 or not is_first or element.strip():
                    yield element
                start, is_first = token.end(), False
            if depth < 0:
                _require_end(buffer[start:], file)
                return
            if kind == b'"':
                break
        else:
            scanned = len(buffer)
        buffer, scanned = buffer[start:], scanned - start
        if len(buffer) > MAX_BYTES:
            raise StartupError(f"an element of the array is {TOO_LONG}")
    raise StartupError("it ends in the middle of the array")


def _require_end(rest: bytes, file: io.BufferedReader) -> None:
    while not rest.strip():
        rest = file.read(BLOCK_BYTES)
        if not rest:
            return
    raise StartupError("there is something after the array")
