"""Makes a model process that is started with this folder on its PYTHONPATH really lose its device, once.

When the file named by LOSE_DEVICE appears, it is removed, and a kernel reads far past its memory. After this
illegal access every CUDA call of the process fails. Without CUDA, the process is killed instead.
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
    # A model that is prepared for a CPU needs no torch.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        os.kill(os.getpid(), signal.SIGKILL)

    memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    # The same memory, but declared as a tebibyte; int64, since the sum of bytes would first convert them.
    beyond = SimpleNamespace(
        __cuda_array_interface__={
            "data": (memory.data_ptr(), False),
            "shape": (1 << 37,),
            "typestr": "<i8",
            "version": 3,
        }
    )
    torch.as_tensor(beyond, device="cuda").sum().item()


if "embedding_service.sharing.server" in sys.orig_argv and "LOSE_DEVICE" in os.environ:
    threading.Thread(target=lose, args=[Path(os.environ["LOSE_DEVICE"])], daemon=True).start()
