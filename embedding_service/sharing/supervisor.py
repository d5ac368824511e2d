"""The supervisor: keeps one model process per device alive, and tells the master when to give up.

Lifetimes depend on pipes, not signals: the master holds the supervisor's standard input, the supervisor
holds each model process's. If a process dies, however it dies, the ones below it see end-of-file and
exit. In the other direction, the master and its web workers see the end of the supervisor's report, and
the supervisor has the exit code of a model process and the report that it wrote to its standard input.
"""

import contextlib
import dataclasses
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO

import msgspec

from embedding_service.observability import logs
from embedding_service.settings.config import Config
from embedding_service.sharing.runtime_folder import RuntimeFolder
from embedding_service.sharing.settings import EX_CONFIG, EX_SOFTWARE, ExitReason, LoadReport
from embedding_service.sharing.watch import Watch

# Not __name__, which is __main__ where this runs as a process.
log = logging.getLogger("embedding_service.sharing.supervisor")
native = logging.getLogger("stderr")

MAX_DEATHS, DEATHS_WITHIN_SECONDS = 5, 60.0
BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0)
POLL_SECONDS = 0.1
STOP_SECONDS = 3.0
MAX_REPORT_BYTES = 1 << 16


class Child:
    """One model process and its history."""

    def __init__(self, folder: RuntimeFolder, index: int, settings: Config) -> None:
        self._folder, self._index = folder, index
        self._settings = settings.of_model_process(index)
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._start_at = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch = Watch(self._settings.hang_seconds)

    def keep_alive(self) -> ExitReason | None:
        """Start the process if it is due; returns a reason if restarting is pointless."""
        if self._process is None:
            if time.monotonic() >= self._start_at:
                self._start()
            return None
        code = self._process.poll()
        if code is None:
            if self._watch.is_overdue(self._heartbeat()):
                log.critical("The model process is hung; killing it")
                self._process.kill()
            return None
        self._process = None
        return self._died(code)

    def stop(self) -> None:
        """End the process, which exits when its standard input closes."""
        if self._process is None:
            return
        self._socket.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _heartbeat(self) -> int | None:
        """When the process last showed a sign of life: a hang can keep its own watch from running."""
        try:
            return self._folder.heartbeat(self._index).stat().st_mtime_ns
        except FileNotFoundError:
            return None  # still loading

    def _start(self) -> None:
        self._folder.socket(self._index).unlink(missing_ok=True)
        self._folder.heartbeat(self._index).unlink(missing_ok=True)
        arguments = [str(self._folder.path), str(self._index), msgspec.json.encode(self._settings).decode()]
        output = subprocess.PIPE if self._settings.log_format == "json" else None
        self._socket, its_end = socket.socketpair()
        with its_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "embedding_service.sharing.server", *arguments],
                stdin=its_end.fileno(),
                stdout=output,
                stderr=output and subprocess.STDOUT,
            )
        if self._process.stdout is not None:
            # Outside the lock, so that the last output of a crashing process is not lost.
            threading.Thread(target=_pass_on, args=[self._process.stdout], daemon=True).start()

    def _died(self, code: int) -> ExitReason | None:
        now = time.monotonic()
        first = not self._deaths
        self._deaths.append(now)
        report = self._report()
        if code == EX_CONFIG and first:
            return ExitReason(EX_CONFIG, report.failure)
        if report.device:
            # From now on, only the same device will do: never fall back to the CPU silently.
            self._settings = dataclasses.replace(self._settings, device=report.device, cpu_fallback=False)
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        process = f"the model process ({self._settings.device})"
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WITHIN_SECONDS:
            return ExitReason(
                EX_SOFTWARE,
                f"{process} ended {MAX_DEATHS} times in {DEATHS_WITHIN_SECONDS:.0f} s, most recently {how}",
            )
        recent = sum(now - death < DEATHS_WITHIN_SECONDS for death in self._deaths)
        wait = BACKOFF_SECONDS[min(recent, len(BACKOFF_SECONDS)) - 1]
        self._count_restart()
        log.error("%s ended %s; starting it again in %.1f s", process.capitalize(), how, wait)
        self._start_at = now + wait
        return None

    def _count_restart(self) -> None:
        # Half of this process's memory, and of the time before a model process starts, unless it is needed.
        from embedding_service.observability import metrics

        metrics.share(self._folder.metrics)
        metrics.MODEL_RESTARTS.inc()

    def _report(self) -> LoadReport:
        """What the dead process wrote. Never blocks, even if a child of it has its standard input open."""
        message = b""
        with self._socket, contextlib.suppress(BlockingIOError):
            message = self._socket.recv(MAX_REPORT_BYTES, socket.MSG_DONTWAIT)
        return msgspec.json.decode(message or b"{}", type=LoadReport)


def _pass_on(output: IO[bytes]) -> None:
    """Log a model process's output: its log lines unchanged, anything printed by native code as a record."""
    with output:
        for line in output:
            if line.startswith(b'{"time":'):
                os.write(2, line)
            elif line.strip():
                native.warning("%s", line.decode(errors="replace").rstrip())


def main(folder: RuntimeFolder, report: socket.socket, settings: Config) -> int:
    """Supervise until the master exits or there is a reason to give up; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    master = os.getppid()
    children = [Child(folder, index, settings) for index in range(len(settings.devices))]
    reason: ExitReason | None = None
    while reason is None and not _master_gone():
        for child in children:
            reason = reason or child.keep_alive()
    if reason is not None:
        with contextlib.suppress(OSError):
            report.sendall(msgspec.json.encode(reason))
    for child in children:
        child.stop()
    if reason is not None:
        if os.getppid() == master:
            os.kill(master, signal.SIGTERM)
        # Stay alive while the workers drain, so that none of them mistakes this for a crash.
        while not _master_gone():
            pass
    folder.remove()
    return reason.code if reason is not None else 0


def _master_gone() -> bool:
    """Wait briefly for the end of standard input, whose other end the master holds."""
    readable, _, _ = select.select([0], [], [], POLL_SECONDS)
    return bool(readable) and not os.read(0, 4096)


if __name__ == "__main__":
    settings = msgspec.json.decode(sys.argv[3], type=Config)
    logs.setup(settings)
    # Closed with this process and not before; no model process may hold it.
    report = socket.socket(fileno=int(sys.argv[2]))
    report.set_inheritable(False)
    sys.exit(main(RuntimeFolder(Path(sys.argv[1])), report, settings))
