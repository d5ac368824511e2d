"""The finished output: the vectors as .npy, .jsonl or .parquet, made from the part file row by row."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import orjson

from embedding_service.bulk.columns import import_pyarrow
from embedding_service.bulk.part import Failure, Part
from embedding_service.bulk.paths import new_path
from embedding_service.engine import Vectors
from embedding_service.errors import StartupError

BLOCK_ROWS = 4096

Block = tuple[int, Vectors, dict[int, str]]


def writer(output: Path) -> Callable[[Part, Path], None]:
    """The function that turns a part into `output`, by suffix. Raises StartupError if it is unsupported."""
    writers = {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    chosen = writers.get(output.suffix.lower())
    if chosen is None:
        raise StartupError(f"{output}: the output must end in {', '.join(writers)}")
    if chosen is _write_parquet:
        import_pyarrow()
    return chosen


def finish(part: Part, output: Path) -> None:
    """Make the output from the sealed part; it gets its name only once it is complete."""
    writer(output)(part, output)
    # In this order: a part without its job file could not be resumed.
    part.path.unlink(missing_ok=True)
    part.job_path.unlink()


def _write_npy(part: Part, output: Path) -> None:
    part.path.replace(output)


def _write_jsonl(part: Part, output: Path) -> None:
    new = new_path(output)
    with new.open("wb") as file:
        for first, vectors, errors in _blocks(part):
            for offset, vector in enumerate(vectors):
                error = errors.get(first + offset)
                row = {"row": first + offset, "embedding": None if error else vector, "error": error}
                file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    new.replace(output)


def _write_parquet(part: Part, output: Path) -> None:
    pyarrow, parquet = import_pyarrow()
    new = new_path(output)
    dimension = _open(part).shape[1]
    vector = pyarrow.list_(pyarrow.float32(), dimension)
    schema = pyarrow.schema([("row", pyarrow.int64()), ("embedding", vector), ("error", pyarrow.string())])
    with parquet.ParquetWriter(new, schema) as file:
        for first, vectors, errors in _blocks(part):
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


def _blocks(part: Part) -> Iterator[Block]:
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
        yield first, vectors, found


def _errors(path: Path) -> Iterator[Failure]:
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield msgspec.json.decode(line, type=Failure)
