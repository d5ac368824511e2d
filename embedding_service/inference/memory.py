"""Gives memory back to the system that running a model does not need."""

import ctypes
import sys
from pathlib import Path

MAPS = Path("/proc/self/maps")

# The file of a graph's weights, which stays mapped as long as the graph lives. The addresses of another file
# might be another thread's memory by the time that its pages are given back.
WEIGHTS = "model.bin"

# From sys/mman.h. Of a file that is mapped to be read only, pages that are needed again are read again.
MADV_DONTNEED = 4


def release() -> None:
    """Return what the allocator holds, and the pages of mapped weights that compiled graphs have copied."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    for line in MAPS.read_text().splitlines():
        span, rights, *_ = line.split(maxsplit=2)
        if rights == "r--s" and line.endswith(f"/{WEIGHTS}"):
            start, stop = (int(address, 16) for address in span.split("-"))
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)
    # musl has no such function, and nothing to return.
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
