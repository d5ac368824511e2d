"""The lane that all threads share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from embedding_service.inference.lanes import ExactLane

THREADS = 4


class Exclusive:
    """Fails if two threads are inside at once."""

    def __init__(self) -> None:
        self._inside = threading.Lock()

    def forward(self, _batch):
        assert self._inside.acquire(blocking=False), "two threads at once"
        try:
            threading.Event().wait(0.02)
            return np.zeros((1, 2), np.float32)
        finally:
            self._inside.release()


def test_threads_share_one_lane_and_take_turns():
    opened = []
    start = threading.Barrier(THREADS)

    def open_lane() -> Exclusive:
        threading.Event().wait(0.02)
        opened.append(Exclusive())
        return opened[-1]

    lane = ExactLane(open_lane)

    def run(_number: int) -> None:
        start.wait()
        lane.forward([])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, range(THREADS)))
    assert len(opened) == 1
