"""Converted graphs on disk: the next start with the same weights and versions skips the conversion."""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import openvino

log = logging.getLogger(__name__)

FILE = "model.xml"

# How many graphs of other weights and versions are kept; each is as large as its model.
KEPT = 4


class GraphCache:
    """One entry of the cache. If the disk cannot be read or written, the entry is just missing."""

    def __init__(self, folder: str, facts: str) -> None:
        """`facts` are everything that the graph depends on."""
        name = hashlib.sha256(facts.encode()).hexdigest()[:32]
        self._entry = Path(os.path.expanduser(folder)) / "openvino" / name  # noqa: PTH111 - never raises

    def load(self) -> openvino.Model | None:
        """The graph, or None if it is missing or incomplete."""
        if not (self._entry / FILE).is_file():
            return None
        try:
            graph = openvino.Core().read_model(self._entry / FILE)
            os.utime(self._entry)
        except (OSError, RuntimeError) as error:
            log.debug("The converted model in %s is not used: %s", self._entry, error)
            return None
        return graph

    def save(self, graph: openvino.Model) -> None:
        """Write the graph, whole or not at all: a folder that is renamed when it is complete."""
        try:
            self._entry.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._entry.parent, ignore_cleanup_errors=True) as scratch:
                whole = Path(scratch) / "whole"
                whole.mkdir()
                openvino.save_model(graph, whole / FILE, compress_to_fp16=False)
                whole.rename(self._entry)
            self._drop_old()
        except (OSError, RuntimeError) as error:
            log.warning("CACHE_FOLDER cannot be written, so every start converts the model again: %s", error)

    def forget(self) -> None:
        """Remove an entry that gives wrong answers."""
        shutil.rmtree(self._entry, ignore_errors=True)

    def _drop_old(self) -> None:
        entries = [path for path in self._entry.parent.iterdir() if (path / FILE).is_file()]
        entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in entries[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
