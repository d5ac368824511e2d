"""Keeps the garbage collector away from what a process has loaded for good."""

import gc

# Objects made since the last collection that start the next one, by generation. Python's own 700 come every
# few requests, which make no cycles.
THRESHOLDS = (20_000, 20, 20)


def freeze() -> None:
    """Call once the process has loaded what it needs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
