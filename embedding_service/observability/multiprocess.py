"""Sums metrics over all processes of a service, through files in a shared folder.

A value starts in memory and moves into the folder once its process calls `share`. Each process locks the
lowest free slot of the folder for its lifetime. Files are named after slots, not process ids, so a new
process continues where a dead one stopped: counters outlive their processes, the folder does not grow,
and the gauges of unlocked slots are left out. The files have prometheus-client's format. Its own
multiprocess mode is not used, since it reads the folder from the environment when it is imported.
"""

import contextlib
import os
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector


class SharedValue:
    """One value, as prometheus-client expects it: a cell in memory or in a file of the slot."""

    def __init__(  # noqa: PLR0917 - prometheus-client's own signature
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Iterable[str],
        labelvalues: Iterable[str],
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ) -> None:
        self.is_gauge = typ == "gauge"
        self.file_prefix = f"gauge_{multiprocess_mode}" if self.is_gauge else typ
        self.key: str = mmap_key(metric_name, name, labelnames, labelvalues, help_text)  # type: ignore[arg-type]
        self._cells: array[float] | memoryview[float] = array("d", [0.0])
        self._index = 0
        with _state.lock:
            _state.values.append(self)
            if _state.slot is not None:
                self.move(_state.slot)

    def inc(self, amount: float) -> None:
        with _state.lock:
            self._cells[self._index] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        with _state.lock:
            self._cells[self._index] = value

    def get(self) -> float:
        with _state.lock:
            return self._cells[self._index]

    def get_exemplar(self) -> None:
        """There are none."""

    def move(self, slot: "Slot") -> None:
        """Move the value, counts included, into the slot's file. The caller holds the lock."""
        counted = self._cells[self._index]
        self._cells, self._index = slot.cell(self.file_prefix, self.key)
        self._cells[self._index] = counted if self.is_gauge else self._cells[self._index] + counted

    def leave(self) -> None:
        """In a forked child: count in memory again, from 0; the file and its count are the parent's."""
        self._cells, self._index = array("d", [0.0]), 0


class Slot:
    """A slot number that no other living process uses in this folder, and the files named after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, MmapedDict] = {}
        self._number, self._lock = self._take()

    def cell(self, file_prefix: str, key: str) -> "tuple[memoryview[float], int]":
        """The values of a file, and the index of this key's value, which is created as 0 if missing."""
        file = self._files.get(file_prefix)
        if file is None:
            path = self.folder / f"{file_prefix}_{self._number}.db"
            file = self._files[file_prefix] = MmapedDict(str(path))  # type: ignore[no-untyped-call]
        file.read_value(key)  # type: ignore[no-untyped-call]
        # A file that has grown is mapped again. Cells in the old map stay valid: both map the same pages.
        return memoryview(file._m).cast("d"), file._positions[key] // 8

    def release(self) -> None:
        """In a forked child: close the parent's lock, so that it does not outlive the parent."""
        os.close(self._lock)

    def _take(self) -> tuple[int, int]:
        for number in count():
            # A lock and not a pipe, since any process may ask whether the slot is taken.
            lock = os.open(_lock_path(self.folder, number), os.O_RDWR | os.O_CREAT, 0o600)
            if _locked_by_another(lock, exclusively=True):
                os.close(lock)
                continue
            for stale in self.folder.glob(f"gauge_*_{number}.db"):
                stale.unlink()
            return number, lock
        raise AssertionError("count() does not end")


class _State:
    """The values of this process, and its slot once they are shared."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: list[SharedValue] = []
        self.slot: Slot | None = None

    def leave(self) -> None:
        """In a forked child, where another thread of the parent may have held the lock."""
        self.lock = threading.Lock()
        for value in self.values:
            value.leave()
        if self.slot is not None:
            self.slot.release()
            self.slot = None


_state = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.leave)


def add(amounts: Iterable[tuple[SharedValue, float]], observations: Iterable[tuple[Any, float]]) -> None:
    """Add to values and count observations, each in its histogram, in one taking of the lock.

    The library's own `observe` takes it twice and compares the value with every bound in turn.
    """
    with _state.lock:
        for value, amount in amounts:
            value._cells[value._index] += amount
        for histogram, observed in observations:
            total = histogram._sum
            total._cells[total._index] += observed
            bucket = histogram._buckets[bisect_left(histogram._upper_bounds, observed)]
            bucket._cells[bucket._index] += 1.0


def share(folder: Path) -> None:
    """Share this process's counts, including past ones, with the other processes that use this folder.

    A forked child must call this itself.
    """
    with _state.lock:
        if _state.slot is None:
            slot = Slot(folder)
            for value in _state.values:
                value.move(slot)
            _state.slot = slot


def shared_folder() -> Path | None:
    """The folder in which this process counts."""
    return _state.slot.folder if _state.slot is not None else None


class AllProcesses:
    """The values of all processes in a folder; dead processes contribute counters but no gauges."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        merged: Iterable[Metric] = MultiProcessCollector.merge(self._files())  # type: ignore[no-untyped-call]
        return sorted(merged, key=lambda metric: metric.name)

    def _files(self) -> list[str]:
        living: dict[str, bool] = {}
        files = []
        for path in self._folder.glob("*.db"):
            kind, _, number = path.stem.rpartition("_")
            if kind.startswith("gauge") and not living.setdefault(number, self._lives(number)):
                continue
            # A newly created file is empty for a moment.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size:
                    files.append(str(path))
        return files

    def _lives(self, number: str) -> bool:
        with _lock_path(self._folder, number).open() as lock:
            return _locked_by_another(lock.fileno(), exclusively=False)


def _lock_path(folder: Path, number: int | str) -> Path:
    return folder / f"{number}.lock"


def _locked_by_another(file: int, exclusively: bool) -> bool:
    """Whether another process holds the lock; if not, take it until the file is closed."""
    import fcntl  # not on Windows, where nothing is shared

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
