"""Keeps the garbage collector away from what a process has loaded for good."""

import atexit
import gc

# Objects made since the last collection that start the next one, by generation. Python's own 700 come every
# few requests, which make no cycles.
THRESHOLDS = (20_000, 20, 20)


def freeze() -> None:
    """Call once the process has loaded what it needs."""
    gc.collect()
    gc.freeze()
    # Else the end would take it apart module by module, and gevent before what still uses it.
    atexit.register(gc.unfreeze)
    gc.set_threshold(*THRESHOLDS)
