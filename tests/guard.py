"""Ends what a test run has started and removes its folder, once the run ends or is killed.

`python -m tests.guard FOLDER`: its standard input is a pipe from pytest, which the kernel closes in any case.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator

import psutil

from tests.service import RUN_FOLDER


def processes_of(folder: str) -> Iterator[psutil.Process]:
    """All that the tests of the run with this folder have started, and what these have started."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN_FOLDER) == folder:
                yield process


def main(folder: str) -> None:
    sys.stdin.read()
    # Services stop in order, with their own processes; each is the leader of a session.
    masters = [process for process in processes_of(folder) if os.getsid(process.pid) == process.pid]
    for master in masters:
        with contextlib.suppress(psutil.Error):
            master.terminate()
    psutil.wait_procs(masters, timeout=60)
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
