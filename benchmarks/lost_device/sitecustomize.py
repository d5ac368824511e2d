"""Loses the device of a model process started with this folder on its PYTHONPATH, for real, once.

When the file that LOSE_DEVICE names is there, it is removed, and a kernel reads far past the memory that
it was given: an illegal access, after which every CUDA call of the process fails. Without CUDA the
process ends instead.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace


def lose(sign: Path) -> None:
    while not sign.exists():
        time.sleep(0.05)
    sign.unlink()
    torch = sys.modules["torch"]
    if not torch.cuda.is_initialized():
        os.kill(os.getpid(), signal.SIGKILL)

    memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    # The same memory, said to be a tebibyte.
    beyond = SimpleNamespace(
        __cuda_array_interface__={
            "data": (memory.data_ptr(), False),
            "shape": (1 << 40,),
            "typestr": "|u1",
            "version": 3,
        }
    )
    torch.as_tensor(beyond, device="cuda").sum().item()


if "embedding_service.sharing.server" in sys.orig_argv and "LOSE_DEVICE" in os.environ:
    threading.Thread(target=lose, args=[Path(os.environ["LOSE_DEVICE"])], daemon=True).start()
