"""What batches cost here, kept beside the converted models, so that later starts do not measure again."""

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from embedding_service.inference.budget import BatchCost

log = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")

# Increased whenever costs are measured differently.
FORM = 1


class CostCache:
    """One entry of the cache. If the disk cannot be read or written, the entry is just missing."""

    def __init__(self, folder: str, facts: Sequence[object]) -> None:
        """`facts` are everything that the cost depends on, apart from the CPU, which is added here."""
        name = hashlib.sha256(json.dumps([FORM, cpu_model(), *map(str, facts)]).encode()).hexdigest()[:32]
        self._file = Path(os.path.expanduser(folder)) / "costs" / f"{name}.json"  # noqa: PTH111 - never raises

    def load(self) -> BatchCost | None:
        """The cost, or None if it is missing or implausible."""
        try:
            kept = json.loads(self._file.read_text())
            cost = BatchCost(float(kept["batch_seconds"]), float(kept["token_seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        sound = all(0 < part < math.inf for part in (cost.batch_seconds, cost.token_seconds))
        return cost if sound else None

    def save(self, cost: BatchCost) -> None:
        """Write the cost, whole or not at all."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as scratch:
                json.dump({"batch_seconds": cost.batch_seconds, "token_seconds": cost.token_seconds}, scratch)
            Path(scratch.name).replace(self._file)
        except OSError as error:
            log.debug("The measured cost of batches is not kept for the next start: %s", error)


def cpu_model(cpu_info: Path = CPU_INFO) -> str:
    """The CPU's name, and what it can do: clouds give several kinds the same name."""
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
