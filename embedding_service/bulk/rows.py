"""Rows: the numbered texts of the input, or the errors in their place, parsed from raw bytes."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from embedding_service.errors import StartupError

# Longer lines, records and elements are not read into memory.
MAX_BYTES = 16 << 20
TOO_LONG = f"longer than {MAX_BYTES} bytes"

SHOWN_NAMES = 20


class Row(msgspec.Struct, frozen=True):
    """Row `number` (from 0), which begins on `line` (from 1), with its text or its error."""

    number: int
    line: int
    text: str = ""
    error: str = ""


class BadRow(ValueError):
    """The row has no usable text; the message says why."""


def make_row(number: int, line: int, parse: Callable[[Any], str], raw: Any) -> Row:
    """The row whose text `parse` extracts from the raw value."""
    try:
        return Row(number, line, text=parse(raw))
    except BadRow as error:
        return Row(number, line, error=str(error))


def line_ends(raw: bytes) -> int:
    """How many lines end here: in LF, CR LF or CR."""
    return raw.count(b"\n") + raw.count(b"\r") - raw.count(b"\r\n")


def position(names: Sequence[str], field: str) -> int:
    """The index of the column that holds the text. Raises StartupError unless there is exactly one."""
    count = names.count(field)
    if not count:
        raise StartupError(f"there is no column {field!r}; the columns are {shown(names)}")
    if count > 1:
        raise StartupError(f"there are {count} columns {field!r}; rename all but one")
    return names.index(field)


def decode(raw: bytes) -> str:
    """Decode UTF-8. Raises BadRow."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start}") from None


def encodable(text: str) -> str:
    """Return the text. Raises BadRow if it has lone surrogates, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("the text is not valid Unicode") from None
    return text


def json_text(field: str) -> Callable[[bytes], str]:
    """A parser that extracts the text from a JSON string or a field of a JSON object. It raises BadRow."""
    # Decodes only the text and skips the other fields.
    text_only = msgspec.defstruct("TextOnly", [("value", Any, UNSET)], rename={"value": field})
    decoder = msgspec.json.Decoder(text_only | str)

    def parse(raw: bytes) -> str:
        if not raw.strip():
            raise BadRow("the line is blank")
        try:
            value: Any = decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            try:
                # What Python's json module writes beyond JSON: NaN, Infinity and lone surrogates.
                value = json.loads(raw.decode())
            except (ValueError, RecursionError):
                raise BadRow(f"not valid JSON: {error}") from None
        if isinstance(value, text_only):
            value = {} if value.value is UNSET else {field: value.value}  # type: ignore[attr-defined]
        if isinstance(value, dict):
            if field not in value:
                raise BadRow(f"the object has no field {field!r}; its fields: {_names(raw)}")
            value = value[field]
        if not isinstance(value, str):
            raise BadRow(f"{field!r} is not a string but {type(value).__name__}")
        return encodable(value)

    return parse


def _names(raw: bytes) -> str:
    try:
        return shown(msgspec.json.decode(raw, type=dict[str, msgspec.Raw])) or "none"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "unreadable"


def shown(names: Iterable[str]) -> str:
    """Names of fields or columns, shortened to fit a message."""
    shortened = [name[:60] for name in names]
    return ", ".join(shortened[:SHOWN_NAMES]) + (", …" if len(shortened) > SHOWN_NAMES else "")
