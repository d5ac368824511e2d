"""How the gunicorn master and its workers reach the supervisor: one pipe to it, and one from it.

The master alone holds the supervisor's standard input, so the supervisor sees it end with the master.
The supervisor alone holds the writing end of the report, so the master and every worker see it end with
the supervisor. A message in the report is the reason why the service must end.
Process ids are not used: gunicorn's master reaps every child itself.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from embedding_service.settings.config import Config
from embedding_service.sharing.runtime_folder import RuntimeFolder
from embedding_service.sharing.settings import EX_SOFTWARE, ExitReason

STOP_SECONDS = 10.0


class SupervisorHandle:
    """The supervisor, before and after its start; forked workers inherit this."""

    def __init__(self, folder: RuntimeFolder) -> None:
        self.folder = folder
        self._master = os.getpid()
        self._stopping = False
        # A socket, since workers can peek at its contents without consuming them.
        self._report, self._report_end = socket.socketpair()

    def start(self, settings: Config) -> None:
        """In the master: start the supervisor of the model processes. Raises StartupError."""
        self.folder.check(len(settings.devices))
        report = self._report_end.fileno()
        # `ps` shows arguments.
        without_keys = dataclasses.replace(settings, api_keys=None)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "embedding_service.sharing.supervisor",
                str(self.folder.path),
                str(report),
                msgspec.json.encode(without_keys).decode(),
            ],
            stdin=subprocess.PIPE,
            pass_fds=[report],
            env=_environment(),
        )
        self._report_end.close()

    def forget(self) -> None:
        """In a forked worker: close the pipe whose end tells the supervisor that the master died."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def gone(self) -> bool:
        """Whether the supervisor died without a message. Never blocks or consumes the report."""
        try:
            return not self._stopping and not self._report.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def stop(self) -> ExitReason | None:
        """In the master: end the supervisor and its processes; returns why the service failed, if it did."""
        killed = self.gone()
        self._stopping = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._report.settimeout(STOP_SECONDS)
        message = b""
        try:
            while part := self._report.recv(65536):
                message += part
        except TimeoutError:
            self._process.kill()
        if killed:
            return ExitReason(EX_SOFTWARE, "the supervisor of the model process was killed")
        return msgspec.json.decode(message, type=ExitReason) if message else None

    def stop_master(self) -> None:
        """In the master or a worker: ask the master to drain and end."""
        if self._master in (os.getpid(), os.getppid()):
            os.kill(self._master, signal.SIGTERM)


def _environment() -> dict[str, str]:
    """An environment in which child processes can import this package from any working directory."""
    found = str(Path(__file__).parent.parent.parent)
    others = os.environ.get("PYTHONPATH")  # noqa: TID251 - Python's own, not a setting
    path = f"{found}{os.pathsep}{others}" if others else found
    # No progress bars in the log.
    return {"TQDM_DISABLE": "1"} | os.environ | {"PYTHONPATH": path}  # noqa: TID251


# Made by the master and inherited by its workers: gunicorn imports the app by name, without arguments.
_inherited: SupervisorHandle | None = None


def prepare() -> SupervisorHandle:
    """In the master: the handle, with a new runtime folder. Raises StartupError.

    Made once per process, since gunicorn rereads its configuration at each SIGHUP.
    """
    global _inherited  # noqa: PLW0603
    if _inherited is None:
        _inherited = SupervisorHandle(RuntimeFolder.make())
    return _inherited


def inherited() -> SupervisorHandle | None:
    """In a worker, or a master that preloads the app: the handle; None if no master has prepared one."""
    return _inherited
