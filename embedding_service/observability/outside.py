"""Waits outside the event loop, since a disk or a name server would block all greenlets of a web worker.

The threads, locks and queues here are the operating system's. gevent replaces them in a web worker, so they
are taken from here, which logs.py imports in the master before that.
"""

import time
from _queue import SimpleQueue
from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable
from math import inf

__all__ = ["LockType", "SimpleQueue", "allocate_lock", "run", "start_new_thread"]

PAUSE_SECONDS = 0.002


def run(function: Callable[[], None], seconds: float = inf) -> bool:
    """Call the function in a thread of its own; returns whether it ended in this time. Later, it goes on."""
    running = allocate_lock()
    running.acquire()

    def call() -> None:
        try:
            function()
        finally:
            running.release()

    start_new_thread(call, ())
    until = time.monotonic() + seconds
    while not running.acquire(blocking=False):
        if time.monotonic() > until:
            return False
        time.sleep(PAUSE_SECONDS)  # other greenlets run meanwhile
    return True
