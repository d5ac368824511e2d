"""Nothing that a test run starts outlives it, even if it is killed."""

import os
import subprocess
import sys

import pytest

from tests.service import ROOT, RUN_FOLDER

pytestmark = pytest.mark.process

# A run that starts a process in a session of its own, as services are, and is then killed.
RUN = f"""
import os, subprocess, sys
folder = os.environ["{RUN_FOLDER}"] = sys.argv[1]
subprocess.Popen([sys.executable, "-m", "tests.guard", folder], stdin=subprocess.PIPE, start_new_session=True)
wait = "import signal; print('ready', flush=True); signal.pause()"
left = subprocess.Popen([sys.executable, "-c", wait], start_new_session=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_leaves_no_process_and_no_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != RUN_FOLDER}
    command = [sys.executable, "-c", RUN, str(folder)]
    # Its output ends only when the last process that holds it has ended.
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE, timeout=180
    )
    assert done.returncode == -9
    assert not folder.exists()
