"""`python -m bundle.found` shows what an installation runs on: Python, torch, the driver, CUDA devices."""

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


def describe() -> dict[str, Any]:
    """Versions and devices, as far as they can be read; no host names or paths."""
    import sentence_transformers
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sentence_transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "driver": _driver(),
        "cuda_of_torch": torch.version.cuda,
        "torch_has_code_for": torch.cuda.get_arch_list() if cuda else [],
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if cuda else [],
    }


def _device(index: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(index)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "memory_gib": round(about.total_memory / 2**30, 1),
        "multiprocessors": about.multi_processor_count,
    }


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:
        # Without a driver every call of its library fails, with errors that differ between releases.
        module = Path("/sys/module/nvidia/version")
        return module.read_text().strip() if module.exists() else None
    return version if isinstance(version, str) else version.decode()


def unmet() -> Iterator[str]:
    """Requirements of this environment's packages that neither it nor the machine has."""
    for package in importlib.metadata.distributions(path=[path for path in sys.path if sys.prefix in path]):
        for line in package.requires or []:
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            try:
                version = importlib.metadata.version(need.name)
            except importlib.metadata.PackageNotFoundError:
                version = None
            if version is None or not need.specifier.contains(version, prereleases=True):
                found = f"{need.name} {version or 'is not installed'}"
                yield f"{package.name} {package.version} requires {need.name}{need.specifier}: {found}"


def main() -> None:
    for line in unmet():
        print(line)
    if importlib.util.find_spec("torch") is None:
        print(f"python: {platform.python_version()}")
        print("torch is not installed: only a model that the bundle has prepared is served, on the CPU.")
        return
    found = describe()
    for name, value in found.items():
        if name != "devices" and value:
            print(f"{name}: {value if isinstance(value, str) else ' '.join(value)}")
    for index, device in enumerate(found["devices"]):
        print(f"cuda:{index}: " + ", ".join(f"{key} {value}" for key, value in device.items()))
    if not found["devices"]:
        print("No CUDA device is visible to torch: the service will run on the CPU.")
        if found["driver"]:
            sys.exit("There is an NVIDIA driver, though: this torch has no CUDA, or needs a newer driver.")


if __name__ == "__main__":
    main()
