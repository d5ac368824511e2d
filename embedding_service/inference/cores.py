"""How many cores this process may use: a container or a service manager may allow fewer than there are."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cores(root: Path = Path("/")) -> int:
    """The cores of the affinity mask, or fewer if a control group of this process has a quota.

    `docker run --cpus` and systemd's CPUQuota= are such quotas; every group above counts too. `root` holds
    `proc` and `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in _groups(root) if (quota := _quota(group)) is not None]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the process's groups that may limit its processor time, up to their mount points.

    In a container the path may be that of the host, of which only the mount point exists here.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            places = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            places = [mounts / controllers, mounts / "cpu"]
        else:
            continue
        inside = PurePosixPath(*[part for part in path.split("/") if part not in ("", "..")])
        for place in places:
            yield from (place / group for group in (inside, *inside.parents))


def _quota(group: Path) -> float | None:
    """The group's quota in cores; None if it has none."""
    try:
        if (group / "cpu.max").exists():
            # Of version 2: "200000 100000" is two cores' worth of time, "max 100000" is no limit.
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None
