"""Makes a model process that is started with this folder on its PYTHONPATH ready at once: it loads no model.

A text has a token for each word, and its vector follows from its characters. For tests of processes, logs,
headers and flags. While the file that HELD names exists, the model neither loads nor computes; each text that
reaches it is a line of HELD.seen. A batch with @@hang@@ never ends, and with @@freeze@@ holds the GIL.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

HELD = Path(os.environ.get("HELD", "/nowhere"))


def wait_while_held():
    while HELD.exists():
        time.sleep(0.02)


def on_forward(batch):
    if "HELD" in os.environ:
        with HELD.with_suffix(".seen").open("a") as seen:
            seen.writelines(f"{one.text}\n" for one in batch)
    wait_while_held()
    if any("@@hang@@" in one.text for one in batch):
        time.sleep(3600)
    if any("@@freeze@@" in one.text for one in batch):
        ctypes.PyDLL(None).sleep(3600)


def load(settings):
    """A model without weights, whose load is logged like that of a real one."""
    from tests.inference.fake_runtime import FakeRuntime

    class Words(FakeRuntime):
        def length(self, text):
            return len(text.split()) + 2

    wait_while_held()
    local.log.info("Loaded %s (no model) on %s", settings.embedding_model, settings.device)
    return Words(max_seq_length=settings.max_seq_length, on_forward=on_forward)


if "embedding_service.sharing.server" in sys.orig_argv:
    sys.path.append(str(Path(__file__).parents[2]))

    from embedding_service.inference import local

    local._load_model = load
