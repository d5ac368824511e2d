"""The finished output: the vectors as .npy, .jsonl or .parquet, made from the part file row by row."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from embedding_service.bulk.columns import import_pyarrow
from embedding_service.bulk.part import Failure, Part
from embedding_service.bulk.paths import new_path
from embedding_service.engine import Vectors
from embedding_service.errors import StartupError

BLOCK_ROWS = 4096

Block = tuple[int, npt.NDArray[Any], dict[int, str]]
Convert = Callable[[Vectors], npt.NDArray[Any]]


def writer(output: Path) -> Callable[[Part, Path, Convert | None], None]:
    """The function that turns a part into `output`, by suffix. Raises StartupError if it is unsupported."""
    writers = {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    chosen = writers.get(output.suffix.lower())
    if chosen is None:
        raise StartupError(f"{output}: the output must end in {', '.join(writers)}")
    if chosen is _write_parquet:
        import_pyarrow()
    return chosen


def finish(part: Part, output: Path, convert: Convert | None = None) -> None:
    """Make the output from the sealed part; it gets its name only once it is complete.

    `convert` turns float32 vectors into another number format.
    """
    writer(output)(part, output, convert)
    # In this order: a part without its job file could not be resumed.
    part.path.unlink(missing_ok=True)
    part.job_path.unlink()


def _write_npy(part: Part, output: Path, convert: Convert | None) -> None:
    if convert is None:
        part.path.replace(output)
        return
    new = new_path(output)
    dtype, width = _form(part, convert)
    array = np.lib.format.open_memmap(new, "w+", dtype, (part.rows, width))
    for first, vectors, _ in _blocks(part, convert):
        array[first : first + len(vectors)] = vectors
    array.flush()
    new.replace(output)


def _form(part: Part, convert: Convert) -> tuple[np.dtype[Any], int]:
    """The number format and length of a converted row."""
    one = convert(np.zeros((1, _open(part).shape[1]), np.float32))
    return one.dtype, one.shape[1]


def _write_jsonl(part: Part, output: Path, convert: Convert | None) -> None:
    new = new_path(output)
    with new.open("wb") as file:
        for first, vectors, errors in _blocks(part, convert):
            for offset, vector in enumerate(vectors):
                error = errors.get(first + offset)
                row = {"row": first + offset, "embedding": None if error else vector, "error": error}
                file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    new.replace(output)


def _write_parquet(part: Part, output: Path, convert: Convert | None) -> None:
    pyarrow, parquet = import_pyarrow()
    new = new_path(output)
    dtype, width = _form(part, convert or _unchanged)
    vector = pyarrow.list_(pyarrow.from_numpy_dtype(dtype), width)
    schema = pyarrow.schema([("row", pyarrow.int64()), ("embedding", vector), ("error", pyarrow.string())])
    with parquet.ParquetWriter(new, schema) as file:
        for first, vectors, errors in _blocks(part, convert):
            numbers = range(first, first + len(vectors))
            mask = np.array([number in errors for number in numbers])
            embeddings = pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(vectors.reshape(-1)), type=vector, mask=pyarrow.array(mask)
            )
            columns = [
                pyarrow.array(numbers, pyarrow.int64()),
                embeddings,
                pyarrow.array([errors.get(number) for number in numbers], pyarrow.string()),
            ]
            file.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    new.replace(output)


def _open(part: Part) -> Vectors:
    opened: Vectors = np.load(part.path, mmap_mode="r")
    return opened


def _unchanged(vectors: Vectors) -> Vectors:
    return vectors


def _blocks(part: Part, convert: Convert | None) -> Iterator[Block]:
    """Row number of the first vector, some vectors, and the errors among them by row number."""
    # Map the file again for each block: the pages of one long mapping would count as our memory.
    errors = _errors(part.errors_path)
    pending = next(errors, None)
    for first in range(0, part.rows, BLOCK_ROWS):
        vectors = np.array(_open(part)[first : first + BLOCK_ROWS])
        found: dict[int, str] = {}
        while pending is not None and pending.row < first + len(vectors):
            found[pending.row] = pending.error
            pending = next(errors, None)
        yield first, vectors if convert is None else convert(vectors), found


def _errors(path: Path) -> Iterator[Failure]:
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield msgspec.json.decode(line, type=Failure)
