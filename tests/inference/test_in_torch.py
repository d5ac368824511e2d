"""Threads that need torch share one copy of the model and take turns."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from embedding_service.inference.in_torch import InTorch

THREADS = 4


class Exclusive:
    """Fails if two threads are inside at once."""

    def __init__(self) -> None:
        self._inside = threading.Lock()

    def run(self, _features):
        assert self._inside.acquire(blocking=False), "two threads at once"
        try:
            threading.Event().wait(0.02)
            return np.zeros((1, 2), np.float32)
        finally:
            self._inside.release()


def test_threads_read_the_model_once_and_take_turns(monkeypatch):
    read = []
    start = threading.Barrier(THREADS)

    def read_slowly() -> Any:
        threading.Event().wait(0.02)
        read.append(SimpleNamespace(in_float32=lambda: None))
        return read[-1]

    monkeypatch.setattr("embedding_service.inference.backends.torch.open_session", lambda _model: Exclusive())
    preprocessor = SimpleNamespace(for_copy=lambda _model: SimpleNamespace(pack=lambda batch: batch))
    exact = InTorch(read_slowly, cast(Any, preprocessor))

    def run(_number: int) -> None:
        start.wait()
        exact.forward(cast(Any, None))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, range(THREADS)))
    assert len(read) == 1
