"""Writes the finished output, as .npy, .jsonl or .parquet, from the part file row by row."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

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


def writer(output: Path) -> Callable[[PartFile, Path, Convert | None], None]:
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
    writer(output)(part, output, convert)
    # The job file goes last: a part without it could not be resumed.
    part.path.unlink(missing_ok=True)
    if output.suffix.lower() != ".npy":
        # The rows of these formats hold their places themselves.
        part.chunks_path.unlink(missing_ok=True)
    part.job_path.unlink()


def _write_npy(part: PartFile, output: Path, convert: Convert | None) -> None:
    if convert is None:
        part.path.replace(output)
        return
    new = new_path(output)
    dtype, width = _form(part, convert)
    array = np.lib.format.open_memmap(new, "w+", dtype, (part.rows, width))
    first = 0
    for vectors, _, _ in _blocks(part, convert):
        array[first : first + len(vectors)] = vectors
        first += len(vectors)
    array.flush()
    new.replace(output)


def _form(part: PartFile, convert: Convert) -> tuple[np.dtype[Any], int]:
    """The number format and length of a converted row."""
    one = convert(np.zeros((1, _open(part).shape[1]), np.float32))
    return one.dtype, one.shape[1]


def _write_jsonl(part: PartFile, output: Path, convert: Convert | None) -> None:
    new = new_path(output)
    with new.open("wb") as file:
        for vectors, places, errors in _blocks(part, convert):
            for vector, place in zip(vectors, places, strict=True):
                error = errors.get(place.row)
                row: dict[str, Any] = {"row": place.row}
                if part.has_chunks:
                    row |= {"start": place.start, "end": place.end}
                row |= {"embedding": None if error else vector, "error": error}
                file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    new.replace(output)


def _write_parquet(part: PartFile, output: Path, convert: Convert | None) -> None:
    pyarrow, parquet = import_pyarrow()
    new = new_path(output)
    dtype, width = _form(part, convert or _unchanged)
    vector = pyarrow.list_(pyarrow.from_numpy_dtype(dtype), width)
    spans = [("start", pyarrow.int64()), ("end", pyarrow.int64())] if part.has_chunks else []
    schema = pyarrow.schema(
        [("row", pyarrow.int64()), *spans, ("embedding", vector), ("error", pyarrow.string())]
    )
    with parquet.ParquetWriter(new, schema) as file:
        for vectors, places, errors in _blocks(part, convert):
            mask = np.array([place.row in errors for place in places])
            embeddings = pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(vectors.reshape(-1)), type=vector, mask=pyarrow.array(mask)
            )
            columns = [
                pyarrow.array([place.row for place in places], pyarrow.int64()),
                *(pyarrow.array([getattr(place, name) for place in places], kind) for name, kind in spans),
                embeddings,
                pyarrow.array([errors.get(place.row) for place in places], pyarrow.string()),
            ]
            file.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    new.replace(output)


def _open(part: PartFile) -> Vectors:
    opened: Vectors = np.load(part.path, mmap_mode="r")
    return opened


def _unchanged(vectors: Vectors) -> Vectors:
    return vectors


def _blocks(part: PartFile, convert: Convert | None) -> Iterator[Block]:
    """Yield blocks of vectors: the vectors, their places, and their errors by the input's row."""
    # Map the file again for each block: the pages of a single mapping would all count as our memory.
    errors = _errors(part.errors_path)
    pending = next(errors, None)
    every_place = _places(part)
    for first in range(0, part.rows, BLOCK_ROWS):
        vectors = np.array(_open(part)[first : first + BLOCK_ROWS])
        places = list(islice(every_place, len(vectors)))
        found: dict[int, str] = {}
        while pending is not None and pending.row <= places[-1].row:
            found[pending.row] = pending.error
            pending = next(errors, None)
        yield vectors if convert is None else convert(vectors), places, found


def _places(part: PartFile) -> Iterator[Place]:
    if not part.has_chunks:
        yield from map(Place, range(part.rows))
        return
    with part.chunks_path.open("rb") as file:
        for line in file:
            yield msgspec.json.decode(line, type=Place)


def _errors(path: Path) -> Iterator[BadRow]:
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield msgspec.json.decode(line, type=BadRow)
