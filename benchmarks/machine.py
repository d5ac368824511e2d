"""Describes the machine of a measurement: processor, cores, memory, versions. No host names or paths."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import config

PACKAGES = (
    "torch",
    "sentence-transformers",
    "transformers",
    "openvino",
    "numpy",
    "flask",
    "gunicorn",
    "orjson",
)
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    """A description that fits in a results file."""
    information = _read("/proc/cpuinfo")
    flags = set(_first(r"^flags\s*: (.*)$", information).split())
    memory = int(_first(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo")) or 0)
    return {
        "cpu": _first(r"^model name\s*: (.*)$", information) or platform.machine(),
        "cores": cores(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(memory / 2**20),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "load_average_before": os.getloadavg()[0],
    }


def model() -> str:
    """The model to measure: the service's own setting, so that a bundle's model is found."""
    return config.load().embedding_model


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit that is measured, with a + if files differ from it."""
    return _run("git", "describe", "--always", "--dirty=+", "--abbrev=12") or "unknown"


def _gpu() -> str | None:
    return _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
