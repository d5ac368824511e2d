"""How many cores this process may use, which a container may have made fewer than the machine has."""

import math
import os
from pathlib import Path

# Of cgroup v2: "200000 100000" is two cores' worth of time, "max 100000" is no limit.
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def available_cores(cpu_max: Path = CPU_MAX) -> int:
    """The cores of the affinity mask, or fewer where the cgroup has a quota (docker run --cpus)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores
