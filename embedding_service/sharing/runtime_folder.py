"""The private folder shared by the processes of one service: its layout and lifetime."""

import atexit
import errno
import os
import shutil
import tempfile
from pathlib import Path

from embedding_service.errors import StartupError

MEMORY_FOLDER = "/dev/shm"  # noqa: S108

# Enough for the metrics of 64 web workers.
ROOM_BYTES = 16 << 20

# sun_path of sockaddr_un: 108 bytes on Linux, 104 on BSD and macOS.
MAX_SOCKET_PATH = 103


class RuntimeFolder:
    """The paths in the folder. The gunicorn master creates it; every other process is given its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics"

    @classmethod
    def make(cls) -> "RuntimeFolder":
        """A new folder, removed when this process ends. Raises StartupError.

        If the process is killed, its supervisor removes the folder.
        """
        try:
            folder = cls(_make_folder_with_room())
            folder.metrics.mkdir()
        except OSError as error:
            raise StartupError(
                f"No folder for the service's sockets can be made: {error}; set TMPDIR"
            ) from None
        atexit.register(folder._remove_if_mine, os.getpid())
        return folder

    def check(self, model_processes: int) -> None:
        """Raises StartupError if a socket path would be too long with this many processes."""
        if len(str(self.socket(model_processes - 1))) > MAX_SOCKET_PATH:
            raise StartupError(
                f"The path of {self.path} is too long for a socket; set TMPDIR to a shorter one"
            )

    def socket(self, index: int) -> Path:
        """Where the model process of device number `index` listens."""
        return self.path / f"model-{index}.sock"

    def heartbeat(self, index: int) -> Path:
        """The heartbeat file, which the model process touches as long as its threads run."""
        return self.path / f"model-{index}.heartbeat"

    def remove(self) -> None:
        """Remove the folder, if it is still there."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _remove_if_mine(self, owner: int) -> None:
        # A forked worker also runs the exit handlers of its parent.
        if os.getpid() == owner:
            self.remove()


def _make_folder_with_room() -> Path:
    """TMPDIR if set, else a folder in memory, which does not depend on a full or slow disk."""
    named = os.environ.get("TMPDIR")  # noqa: TID251 - every program's convention, not a setting of ours
    reason = OSError("there is no folder for temporary files")
    for place in [named] if named else [MEMORY_FOLDER, None]:
        try:
            parent = place or tempfile.gettempdir()
            # Metrics are written through mmap: on a full disk that is no error, but a SIGBUS.
            if shutil.disk_usage(parent).free < ROOM_BYTES:
                raise OSError(errno.ENOSPC, f"less than {ROOM_BYTES >> 20} MiB are free", parent)
            return Path(tempfile.mkdtemp(prefix=f"embedding-service-{os.getpid()}-", dir=parent))
        except OSError as error:
            reason = error
    raise reason
