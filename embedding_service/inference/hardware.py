"""What this machine can compute with, found out without importing torch."""

import contextlib
import ctypes.util
import importlib
import importlib.metadata
import importlib.util
import os
import platform

# From cuda.h.
CUDA_ERROR_NO_DEVICE = 100


def no_cuda() -> str | None:
    """Why CUDA is certainly unavailable; None if only torch can find out."""
    try:
        build = importlib.metadata.version("torch").partition("+")[2]
    except importlib.metadata.PackageNotFoundError:
        return "torch is not installed"
    if build == "cpu":
        return "the installed torch was built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # noqa: TID251 - CUDA's own, not a setting
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every device"
    return None if build.startswith("rocm") else _no_nvidia_device()


def _no_nvidia_device() -> str | None:
    driver = ctypes.util.find_library("cuda")
    if driver is None:
        return "the NVIDIA driver (libcuda) is not installed"
    with contextlib.suppress(OSError):
        if ctypes.CDLL(driver).cuInit(0) == CUDA_ERROR_NO_DEVICE:
            return "the NVIDIA driver finds no device"
    return None


def computes_bfloat16(device: str, backend: str) -> bool:
    """Whether OpenVINO can compute in bfloat16 here: on a CPU with avx512_bf16 or AMX."""
    if device != "cpu" or backend == "torch" or importlib.util.find_spec("openvino") is None:
        return False
    # Our package is imported first: it keeps OpenVINO from reporting to another host.
    importlib.import_module("embedding_service.inference.backends")
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def can_run_openvino() -> bool:
    """Whether OpenVINO is installed and this is an x86 CPU, for which it is made."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and importlib.util.find_spec("openvino") is not None


def share_cores(on_cpu: bool) -> None:
    """Keep the tokenizer from taking the cores from the model, if that runs on the CPU."""
    # The library has no other switch.
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if on_cpu else "true"  # noqa: TID251
