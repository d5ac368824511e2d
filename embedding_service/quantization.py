"""Smaller number formats for vectors, with the same bits as sentence_transformers' quantize_embeddings."""

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from embedding_service.engine import Int8Ranges, Vectors
from embedding_service.errors import InvalidRequest, StartupError

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

# Number of steps that the range of a dimension is divided into.
STEPS = 255


def quantize(
    vectors: Vectors, precision: Precision, ranges: Int8Ranges | None = None, field: str = "precision"
) -> npt.NDArray[Any]:
    """Convert vectors of shape (texts, dimension) to another number format, one row per text.

    binary and ubinary pack eight dimensions into a byte. `field` is the caller's name for the precision.
    Raises InvalidRequest if int8 or uint8 is requested and there are no ranges for this dimension.
    """
    if precision == "float32":
        return vectors
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1) - 128).astype(np.int8)
    if ranges is None:
        raise InvalidRequest(
            f"is {precision}, which needs calibrated ranges: set INT8_RANGES to a file that "
            "`embedding-service calibrate` writes",
            field=field,
        )
    if vectors.shape[1] != len(ranges.minimum):
        raise InvalidRequest(
            f"is {precision}, whose ranges are for {len(ranges.minimum)} dimensions, not {vectors.shape[1]}",
            field=field,
        )
    starts = np.array(ranges.minimum, np.float32)
    steps = (np.array(ranges.maximum, np.float32) - starts) / STEPS
    steps = np.where(steps == 0, 1, steps)
    values = np.clip(np.floor((vectors - starts) / steps), 0, STEPS)
    return values.astype(np.uint8) if precision == "uint8" else (values - 128).astype(np.int8)


def find_ranges(vectors: Vectors, fingerprint: str) -> Int8Ranges:
    """The ranges of calibration vectors."""
    return Int8Ranges(
        fingerprint=fingerprint,
        minimum=vectors.min(axis=0).astype(float).tolist(),
        maximum=vectors.max(axis=0).astype(float).tolist(),
    )


def read_ranges(given: str | Path, fingerprint: str | None = None) -> Int8Ranges:
    """The ranges in a file. Raises StartupError if it holds none, or those of another model."""
    path = Path(given).expanduser()
    try:
        ranges = msgspec.json.decode(path.read_bytes(), type=Int8Ranges)
    except OSError as error:
        raise StartupError(f"INT8_RANGES={str(path)!r} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(
            f"INT8_RANGES={str(path)!r} was not written by `embedding-service calibrate`: {error}"
        ) from None
    if fingerprint not in (None, ranges.fingerprint):
        raise StartupError(
            f"INT8_RANGES={str(path)!r} was calibrated with another model or other model settings; "
            "run `embedding-service calibrate` again"
        )
    return ranges
