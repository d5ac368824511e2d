"""What the gunicorn master holds of the supervisor: it starts it, lets it go, and reads its verdict."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from embedding_service.errors import StartupError
from embedding_service.sharing.settings import EX_SOFTWARE, LOCK_NAME, VERDICT_NAME, ProcessSettings, Verdict

# sun_path of sockaddr_un: 108 bytes on Linux, 104 on BSD and macOS.
MAX_SOCKET_PATH = 103


class Supervision:
    """A running supervisor. The master must not reap it by pid: gunicorn waits for every child itself."""

    def __init__(self, folder: Path, processes: list[ProcessSettings]) -> None:
        """Start the supervisor, with the private runtime folder. Raises StartupError."""
        if any(len(process.socket_path) > MAX_SOCKET_PATH for process in processes):
            raise StartupError(f"The path of {folder} is too long for a socket; set TMPDIR to a shorter one")
        self._folder = folder
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "embedding_service.sharing.supervisor",
                str(folder),
                msgspec.json.encode(processes).decode(),
            ],
            stdin=subprocess.PIPE,
            env=_environment(),
        )

    def forget(self) -> None:
        """In a forked worker: let go of the pipe whose end tells the supervisor that the master died."""
        assert self._process.stdin is not None
        os.close(self._process.stdin.fileno())

    def stop(self) -> Verdict | None:
        """End the supervisor and all below it; returns why the service failed, if it did."""
        verdict = self._verdict()
        if verdict is None and supervisor_gone(self._folder):
            verdict = Verdict(EX_SOFTWARE, "the supervisor of the model process was killed")
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        return verdict

    def _verdict(self) -> Verdict | None:
        try:
            return msgspec.json.decode((self._folder / VERDICT_NAME).read_bytes(), type=Verdict)
        except FileNotFoundError:
            return None


def _environment() -> dict[str, str]:
    """The environment in which every process below finds this package, whatever folder it runs in."""
    found = str(Path(__file__).parent.parent.parent)
    others = os.environ.get("PYTHONPATH")  # noqa: TID251 - Python's own, not a setting
    return os.environ | {"PYTHONPATH": f"{found}{os.pathsep}{others}" if others else found}  # noqa: TID251


def supervisor_gone(folder: Path) -> bool:
    """Whether the supervisor has been there and is no more."""
    try:
        with (folder / LOCK_NAME).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return False
    return True


def stop_master(folder: Path) -> None:
    """Ask the gunicorn master, which is this process or its parent, to drain and end."""
    master = int((folder / LOCK_NAME).read_text())
    if master in (os.getpid(), os.getppid()):
        os.kill(master, signal.SIGTERM)
