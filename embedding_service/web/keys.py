"""The accepted keys, from the settings and from a file that may change while the service runs."""

import functools
import hashlib
import hmac
import logging
import time
from pathlib import Path

from embedding_service.errors import StartupError
from embedding_service.observability import outside

log = logging.getLogger(__name__)

OPEN_WARNING = (
    "Anyone who can reach %s can use this service: no key is required. Set API_KEYS or API_KEYS_FILE, "
    "or HOST=127.0.0.1 for this machine only"
)

# How often the file is looked at, and how long one request waits for it.
REREAD_SECONDS, PATIENCE_SECONDS = 1.0, 0.5

Version = tuple[int, ...]


@functools.cache
def ring(listed: str | None, file: str | None) -> "KeyRing":
    """The keys of this process. A web worker inherits those that its master has read."""
    return KeyRing(listed, file)


class KeyRing:
    """Keeps only hashes of the keys. Comparing them takes the same time whatever a caller sends."""

    def __init__(self, listed: str | None, file: str | None) -> None:
        """`listed` is comma-separated; `file` has one key per line, and comment lines that begin with #."""
        self.required = listed is not None or file is not None
        self._listed = _hashes((listed or "").split(","))
        self._file = file
        self._version: Version = ()
        self._filed: list[bytes] = []
        self._problem = ""
        self._is_reading = False
        self._due = 0.0

    def check(self) -> None:
        """Raises StartupError if keys are configured but there are none: nobody could use the service."""
        if self._file is not None:
            self._read()
            if self._problem:
                raise StartupError(f"API_KEYS_FILE={self._file!r} cannot be read: {self._problem}")
        if self.required and not (self._listed or self._filed):
            raise StartupError(
                "API_KEYS and API_KEYS_FILE contain no key; to serve without keys, leave both empty"
            )

    def holds(self, key: bytes) -> bool:
        """Whether this is one of the keys; changes to the file count after REREAD_SECONDS."""
        if self._file is not None and not self._is_reading and time.monotonic() >= self._due:
            self._refresh()
        sent = hashlib.sha256(key).digest()
        found = False
        for known in (*self._listed, *self._filed):
            found |= hmac.compare_digest(sent, known)
        return found

    def _refresh(self) -> None:
        """Read the file again if it has changed. If its disk hangs, the last known keys stay valid."""
        self._due = time.monotonic() + REREAD_SECONDS
        version, problem = self._version, self._problem
        self._is_reading = True
        if not outside.run(self._read, PATIENCE_SECONDS):
            self._problem = "its disk does not answer"
        if self._problem and self._problem != problem:
            log.error("API_KEYS_FILE cannot be read; the last known keys stay valid: %s", self._problem)
        elif self._version != version:
            log.info("Read %d keys from API_KEYS_FILE", len(self._filed))

    def _read(self) -> None:
        try:
            file = Path(self._file or "")
            facts = file.stat()
            # From before reading, so that a change made meanwhile is noticed next time.
            version = facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino
            if version != self._version:
                lines = file.read_text(encoding="utf-8").splitlines()
                self._filed = _hashes([line for line in lines if not line.lstrip().startswith("#")])
                self._version = version
            self._problem = ""
        except OSError as error:
            self._problem = error.strerror or type(error).__name__
        except ValueError:
            self._problem = "it is not UTF-8"
        finally:
            self._is_reading = False


def _hashes(keys: list[str]) -> list[bytes]:
    return [hashlib.sha256(key.strip().encode()).digest() for key in keys if key.strip()]
