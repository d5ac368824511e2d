"""Reads rows from a text column of a .parquet file; row i is reported as line i + 1."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

from embedding_service.bulk.rows import BadRow, Row, decode, make_row, position, shown
from embedding_service.errors import StartupError

BATCH_ROWS = 1024


def read(file: io.BufferedReader, field: str) -> Iterator[Row]:
    """Yield a row for each value of the column. Raises StartupError if it is missing or not text."""
    with _opened(file) as table:
        pyarrow, _ = import_pyarrow()
        path = _path(table.schema_arrow, field)
        number = 0
        for batch in table.iter_batches(BATCH_ROWS, columns=[field], use_threads=False):
            column = batch.column(0)
            if path[1:]:
                column = pyarrow.compute.struct_field(column, path[1:])
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # Read as bytes, so that invalid UTF-8 fails only its own row.
            for raw in column.cast("large_binary").to_pylist():
                yield make_row(number, number + 1, _text, raw)
                number += 1


def count(file: io.BufferedReader) -> int:
    """The number of rows."""
    with _opened(file) as table:
        rows: int = table.metadata.num_rows
    return rows


def import_pyarrow() -> tuple[Any, Any]:
    """Import pyarrow and pyarrow.parquet. Raises StartupError if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        from pyarrow import parquet
    except ImportError:
        raise StartupError("a .parquet file needs pyarrow: pip install pyarrow") from None
    return pyarrow, parquet


@contextmanager
def _opened(file: io.BufferedReader) -> Iterator[Any]:
    pyarrow, parquet = import_pyarrow()
    with ExitStack() as stack:
        opened: BinaryIO = file
        if not (isinstance(file.raw, io.FileIO) and file.seekable()):
            # Parquet's index is at the end of the file, so a stream is first copied to disk.
            opened = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, opened, 1 << 20)
        try:
            yield stack.enter_context(parquet.ParquetFile(opened))
        except pyarrow.ArrowInvalid as error:
            raise StartupError(f"it is not a valid parquet file: {error}") from None


def _path(schema: Any, field: str) -> list[str]:
    """The names that lead to the text: one, or those of structs and the field in the last of them.

    Raises StartupError if they do not lead to text, which may be stored as bytes.
    """
    pyarrow, _ = import_pyarrow()
    path = [field] if field in schema.names else field.split(".")
    kind = schema.field(position(schema.names, path[0])).type
    for depth, name in enumerate(path[1:], 1):
        outer = ".".join(path[:depth])
        if not pyarrow.types.is_struct(kind):
            raise StartupError(f"the column {outer!r} holds {kind}, which has no fields")
        names = [each.name for each in kind]
        if name not in names:
            raise StartupError(f"{outer!r} has no field {name!r}; its fields are {shown(names)}")
        kind = kind.field(name).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if pyarrow.types.is_struct(plain):
        names = [f"{field}.{each.name}" for each in plain]
        raise StartupError(f"the column {field!r} is a struct; choose one of its fields: {shown(names)}")
    if str(plain).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
        raise StartupError(f"the column {field!r} holds {kind}, not text")
    return path


def _text(raw: bytes | None) -> str:
    if raw is None:
        raise BadRow("the value is null")
    return decode(raw)
