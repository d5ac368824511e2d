"""Decompresses gzip and Zstandard input, which is recognised by its first bytes, not its name."""

import gzip
import io
import zlib
from typing import Any, cast

from embedding_service.errors import StartupError

try:
    from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

ENDINGS = (".gz", ".zst")

# Raised while reading a truncated or damaged file.
DAMAGED: tuple[type[Exception], ...] = (
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    *([zstd.ZstdError] if zstd else []),
)


def decompressed(file: io.BufferedReader) -> io.BufferedReader:
    """The decompressed content. Raises StartupError if the package for it is not installed."""
    head = file.peek(4)
    inner: Any
    if head.startswith(b"\x1f\x8b"):
        inner = gzip.GzipFile(fileobj=file)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        if zstd is None:
            raise StartupError("it is compressed with Zstandard: pip install backports.zstd")
        inner = zstd.ZstdFile(file)
    else:
        return file
    return io.BufferedReader(cast(io.RawIOBase, inner), 1 << 18)
