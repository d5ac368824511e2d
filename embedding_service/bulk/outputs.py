"""Writes the finished output, as .npy, .jsonl or .parquet, from the part file row by row."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from embedding_service.bulk.columns import import_pyarrow
from embedding_service.bulk.part import BadRow, PartFile, Place
from embedding_service.bulk.paths import new_path
from embedding_service.engine import Vectors
from embedding_service.errors import StartupError

BLOCK_ROWS = 4096

Block = tuple[npt.NDArray[Any], list[Place], dict[int, str]]
Convert = Callable[[Vectors], npt.NDArray[Any]]
Line = TypeVar("Line")


def writer(output: Path) -> Callable[[PartFile, Path, Convert], None]:
    """The function that converts a part, by output suffix. Raises StartupError if it is unsupported."""
    writers = {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    chosen = writers.get(output.suffix.lower())
    if chosen is None:
        raise StartupError(f"{output}: the output must end in {', '.join(writers)}")
    if chosen is _write_parquet:
        import_pyarrow()
    return chosen


def finish(part: PartFile, output: Path, convert: Convert | None = None) -> None:
    """Write the output from the sealed part; it gets its final name only once it is complete.

    `convert` turns float32 vectors into another number format.
    """
    write, paths = writer(output), part.paths
    if write is _write_npy and convert is None:
        paths.part.replace(output)
    else:
        new = new_path(output)
        write(part, new, convert or _unchanged)
        new.replace(output)
    # The job file goes last: a part without it could not be resumed.
    paths.part.unlink(missing_ok=True)
    if write is not _write_npy:
        # The rows of these formats hold their places themselves.
        paths.chunks.unlink(missing_ok=True)
    paths.job.unlink()


def _write_npy(part: PartFile, new: Path, convert: Convert) -> None:
    one = _zeros(part, convert)
    array = np.lib.format.open_memmap(new, "w+", one.dtype, (part.rows, len(one)))
    first = 0
    for vectors, _, _ in _blocks(part, convert):
        array[first : first + len(vectors)] = vectors
        first += len(vectors)
    array.flush()


def _write_jsonl(part: PartFile, new: Path, convert: Convert) -> None:
    with new.open("wb") as file:
        for vectors, places, errors in _blocks(part, convert):
            for vector, place in zip(vectors, places, strict=True):
                error = errors.get(place.row)
                row: dict[str, Any] = {"row": place.row}
                if part.has_chunks:
                    row |= {"start": place.start, "end": place.end}
                row |= {"embedding": None if error else vector, "error": error}
                file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def _write_parquet(part: PartFile, new: Path, convert: Convert) -> None:
    pyarrow, parquet = import_pyarrow()
    one = _zeros(part, convert)
    vector = pyarrow.list_(pyarrow.from_numpy_dtype(one.dtype), len(one))
    names = ["row", "start", "end"] if part.has_chunks else ["row"]
    numbers = [(name, pyarrow.int64()) for name in names]
    schema = pyarrow.schema([*numbers, ("embedding", vector), ("error", pyarrow.string())])
    with parquet.ParquetWriter(new, schema) as file:
        for vectors, places, errors in _blocks(part, convert):
            mask = np.array([place.row in errors for place in places])
            columns = [
                *(pyarrow.array([getattr(place, name) for place in places], kind) for name, kind in numbers),
                pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(vectors.reshape(-1)), type=vector, mask=pyarrow.array(mask)
                ),
                pyarrow.array([errors.get(place.row) for place in places], pyarrow.string()),
            ]
            file.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _zeros(part: PartFile, convert: Convert) -> npt.NDArray[Any]:
    """A converted row, which shows the number format and the length of all."""
    row: npt.NDArray[Any] = convert(np.zeros((1, part.job["dimension"]), np.float32))[0]
    return row


def _unchanged(vectors: Vectors) -> Vectors:
    return vectors


def _blocks(part: PartFile, convert: Convert) -> Iterator[Block]:
    """Yield blocks of vectors: the vectors, their places, and their errors by the input's row."""
    errors = _lines(part.paths.errors, BadRow)
    pending = next(errors, None)
    every_place = _lines(part.paths.chunks, Place) if part.has_chunks else map(Place, count())
    for first in range(0, part.rows, BLOCK_ROWS):
        # Mapped again for each block: the pages of a single mapping would all count as our memory.
        vectors = np.array(np.load(part.paths.part, mmap_mode="r")[first : first + BLOCK_ROWS])
        places = list(islice(every_place, len(vectors)))
        block_errors: dict[int, str] = {}
        while pending is not None and pending.row <= places[-1].row:
            block_errors[pending.row] = pending.error
            pending = next(errors, None)
        yield convert(vectors), places, block_errors


def _lines(path: Path, kind: type[Line]) -> Iterator[Line]:
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield msgspec.json.decode(line, type=kind)
