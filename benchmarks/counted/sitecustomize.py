"""Counts the calls of our functions, by process, in a service started with this folder on its PYTHONPATH.

The counts are written to the folder that COUNTED names, once a file `PID.wanted` is there.
"""

import _thread
import json
import os
import sys
import threading
import time
from pathlib import Path

OURS = os.sep + "embedding_service" + os.sep
folder, counts, sleep = Path(os.environ["COUNTED"]), {}, time.sleep


def count(frame, event, _argument):
    if event == "call":
        code = frame.f_code
        if OURS in code.co_filename and not code.co_name.startswith("<"):
            name = f"{code.co_filename.rpartition(OURS)[2]} {code.co_qualname}"
            counts[name] = counts.get(name, 0) + 1


def write_forever():
    while True:
        sleep(0.05)
        wanted = folder / f"{os.getpid()}.wanted"
        if wanted.exists():
            (folder / "new").write_text(json.dumps(dict(counts)))
            wanted.unlink()
            (folder / "new").rename(folder / f"{os.getpid()}.json")


def begin():
    _thread.start_new_thread(write_forever, ())


sys.setprofile(count)
threading.setprofile(count)
os.register_at_fork(after_in_child=begin)
begin()
