"""What CACHE_FOLDER keeps for the next start: folders that are written whole and checked by their hashes."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from embedding_service.inference.cores import available_cores

log = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")

# In each entry: its key, and the hash of each of its other files.
SUMS = "sums.json"

# How many entries of a kind are kept; one with a graph is as large as its model.
KEPT = 4

# Files are hashed in segments, on all cores at once.
SEGMENT_BYTES = 4 << 20


class Entry:
    """One entry of a kind. If the disk cannot be read or written, the entry is just missing."""

    def __init__(
        self, folder: str | None, kind: str, facts: Sequence[object], made_with: Sequence[object] | None = ()
    ) -> None:
        """`facts` are everything that the entry's content depends on, as well as what it was `made_with`.

        If that is None, the latest entry counts, whatever it was made with. Without a folder there is none.
        """
        self._may_exist = bool(folder)
        place = Path(os.path.expanduser(folder or os.devnull)) / kind  # noqa: PTH111 - never raises
        name = _key([kind, *facts])
        if made_with is not None:
            name = f"{name}-{_key(made_with)}"
        else:
            with contextlib.suppress(OSError):
                found = sorted(place.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
                name = found[-1].name if found else name
        self.path = place / name

    def find(self, unread: str | None = None) -> Path | None:
        """The entry's folder, if it is complete and every file in it is as it was written.

        Of a file `unread`, only the size is compared; `is_sound` reads all of them.
        """
        if not os.path.exists(self.path):  # noqa: PTH110 - never raises
            return None
        if not self.is_sound(unread):
            log.warning("The entry %s is damaged and is made again", self.path)
            self.forget()
            return None
        # For the order in which entries are dropped; the folder may be read-only.
        with contextlib.suppress(OSError):
            os.utime(self.path)
        return self.path

    def save(self, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder, and put it in place whole or not at all. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, ignore_cleanup_errors=True) as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            write(whole)
            (whole / SUMS).write_text(self._sums(whole))
            try:
                whole.rename(self.path)
            except OSError:
                if not self.path.exists():
                    raise
                # Another process was faster, unless what is there is an older entry that is not whole.
                if not self.is_sound():
                    self.path.rename(Path(scratch) / "old")
                    whole.rename(self.path)
        self._drop_old()

    def keep(self, write: Callable[[Path], object], lost: str, level: int = logging.DEBUG) -> bool:
        """Save if possible; if not, say in the log what is `lost`."""
        try:
            if self._may_exist:
                self.save(write)
        except (OSError, RuntimeError) as error:
            log.log(level, "%s: %s", lost, error)
            return False
        return self._may_exist

    def forget(self) -> None:
        """Remove the entry."""
        shutil.rmtree(self.path, ignore_errors=True)

    def is_sound(self, unread: str | None = None) -> bool:
        """Whether every file is as it was written; of one that is `unread`, whether its size is."""
        try:
            written = (self.path / SUMS).read_text()
            known = {name: digest for name, (_, digest) in json.loads(written)[1].items() if name == unread}
            return written == self._sums(self.path, known)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    def _sums(self, folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> str:
        """The entry's name, and the size and the hash, unless `known`, of each file. Raises OSError."""
        names = sorted({path.name for path in folder.iterdir()} - {SUMS})
        with ThreadPoolExecutor(available_cores()) as pool:
            return json.dumps(
                [
                    self.path.name,
                    {
                        name: [(folder / name).stat().st_size, known.get(name) or _hash(folder / name, pool)]
                        for name in names
                    },
                ]
            )

    def _drop_old(self) -> None:
        entries = [path for path in self.path.parent.iterdir() if (path / SUMS).is_file()]
        entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in entries[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


def _key(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode()).hexdigest()[:24]


def _hash(path: Path, pool: ThreadPoolExecutor) -> str:
    def digest(start: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return hashlib.sha256(file.read(SEGMENT_BYTES)).digest()

    size = path.stat().st_size
    parts = pool.map(digest, range(0, size, SEGMENT_BYTES))
    return hashlib.sha256(b"".join([str(size).encode(), *parts])).hexdigest()


def cpu_model(cpu_info: Path = CPU_INFO) -> str:
    """The CPU's name, and what it can do: clouds give several kinds the same name."""
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(facts)}))
