"""Reads rows from a text column of a .parquet file; row i is reported as line i + 1."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

from embedding_service.bulk.rows import BadRow, Row, decode, make_row, shown
from embedding_service.errors import StartupError

BATCH_ROWS = 1024


def read(file: io.BufferedReader, field: str) -> Iterator[Row]:
    """Yield a row for each value of the column. Raises StartupError if it is missing or not text."""
    with _opened(file) as table:
        kind = _text_type(table.schema_arrow, field)
        number = 0
        for batch in table.iter_batches(BATCH_ROWS, columns=[field], use_threads=False):
            # Read as bytes, so that invalid UTF-8 fails only its own row.
            for raw in batch.column(0).cast(kind).cast("large_binary").to_pylist():
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
        from pyarrow import parquet
    except ImportError:
        raise StartupError("a .parquet file needs pyarrow: pip install -r requirements-parquet.txt") from None
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


def _text_type(schema: Any, field: str) -> Any:
    pyarrow, _ = import_pyarrow()
    if field not in schema.names:
        raise StartupError(f"there is no column {field!r}; the columns are {shown(schema.names)}")
    kind = schema.field(field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise StartupError(f"the column {field!r} holds {kind}, not text")
    return kind


def _text(raw: bytes | None) -> str:
    if raw is None:
        raise BadRow("the value is null")
    return decode(raw)
