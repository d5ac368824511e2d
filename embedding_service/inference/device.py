"""Chooses the model's device, and configures the libraries for it."""

import logging

import torch
import transformers

from embedding_service.errors import StartupError

log = logging.getLogger(__name__)

# Two streams, the tokenizer's threads and a web worker or two leave some of these idle.
PLENTY_OF_CORES = 8


def choose_device(wanted: str, cpu_fallback: bool) -> str:
    """The torch device for DEVICE. Raises StartupError if it is missing and must not be the CPU."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        index = int(wanted.partition(":")[2] or 0)
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        missing = index >= visible
        why = f"DEVICE={wanted}, but {visible} CUDA devices are visible"
    elif wanted == "mps":
        missing, why = not torch.backends.mps.is_available(), "DEVICE=mps, but there is no MPS device"
    else:
        missing, why = False, ""
    if not missing:
        return wanted
    if not cpu_fallback:
        raise StartupError(f"{why}, and CPU_FALLBACK=false. Start with --gpus all, or set DEVICE=cpu")
    log.warning("%s: RUNNING ON THE CPU, far slower. CPU_FALLBACK=false makes this an error", why)
    return "cpu"


def device_name(device: str) -> str:
    """The device's model name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def may_spin(cores: int) -> bool:
    """Whether each stream may take a core to wait for the device, of those that the model process has.

    The thread then need not be woken, which takes 150 to 300 µs.
    """
    return cores >= PLENTY_OF_CORES


def prepare_libraries(device: str, threads: int, device_processes: int = 1) -> None:
    """Apply process-wide settings of the libraries; `device_processes` share the device's memory."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        if device_processes > 1:
            with torch.cuda.device(device):
                torch.cuda.set_per_process_memory_fraction(1 / device_processes)
        torch.set_float32_matmul_precision("high")
        # cuDNN's attention takes 50 ms to plan for each new shape of a batch:
        # https://github.com/pytorch/pytorch/pull/155958
        torch.backends.cuda.enable_cudnn_sdp(False)
