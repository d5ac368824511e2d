"""The accepted keys, from the settings and from a file that may change while the service runs."""

import hashlib
import hmac
import logging
import threading
from pathlib import Path

from embedding_service.errors import StartupError

log = logging.getLogger(__name__)

OPEN_WARNING = (
    "Anyone who can reach %s can use this service: no key is required. Set API_KEYS or API_KEYS_FILE, "
    "or HOST=127.0.0.1 for this machine only"
)

Version = tuple[int, ...]


class KeyRing:
    """Keeps only hashes of the keys. Comparing them takes the same time whatever a caller sends."""

    def __init__(self, listed: str | None, file: str | None) -> None:
        """`listed` is comma-separated; `file` has one key per line, and comment lines that begin with #."""
        self.required = listed is not None or file is not None
        self._listed = _hashes((listed or "").split(","))
        self._file = Path(file) if file is not None else None
        self._version: Version | None = None
        self._filed: list[bytes] = []
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises StartupError if keys are configured but there are none: nobody could use the service."""
        if self._file is not None:
            try:
                self._filed = _read(self._file)
            except (OSError, ValueError) as error:
                raise StartupError(
                    f"API_KEYS_FILE={str(self._file)!r} cannot be read: {_why(error)}"
                ) from None
        if self.required and not (self._listed or self._filed):
            raise StartupError(
                "API_KEYS and API_KEYS_FILE contain no key; to serve without keys, leave both empty"
            )

    def holds(self, key: bytes) -> bool:
        """Whether this is currently one of the keys."""
        if self._file is not None:
            self._refresh(self._file)
        sent = hashlib.sha256(key).digest()
        found = False
        for known in (*self._listed, *self._filed):
            found |= hmac.compare_digest(sent, known)
        return found

    def _refresh(self, file: Path) -> None:
        try:
            version = _version(file)
            if version == self._version:
                return
            with self._lock:
                if version != self._version:
                    # The version is from before reading, so a change made meanwhile is noticed next time.
                    self._filed, self._version = _read(file), version
                    log.info("Read %d keys from API_KEYS_FILE", len(self._filed))
        except (OSError, ValueError) as error:
            if self._version != ():
                self._version = ()
                log.error("API_KEYS_FILE cannot be read; the last known keys stay valid: %s", _why(error))


def _hashes(keys: list[str]) -> list[bytes]:
    return [hashlib.sha256(key.strip().encode()).digest() for key in keys if key.strip()]


def _read(file: Path) -> list[bytes]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return _hashes([line for line in lines if not line.lstrip().startswith("#")])


def _version(file: Path) -> Version:
    facts = file.stat()
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino


def _why(error: OSError | ValueError) -> str:
    return error.strerror or "" if isinstance(error, OSError) else "it is not UTF-8"
