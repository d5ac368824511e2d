"""What the supervisor and a model process are told, as JSON on their command lines; and their exit codes."""

from pathlib import Path

import msgspec

from embedding_service.inference.settings import ModelSettings

# From sysexits.h: what no restart can cure, and what one may.
EX_CONFIG, EX_SOFTWARE = 78, 70

# The supervisor keeps this file of the runtime folder locked for as long as it lives.
LOCK_NAME = "supervisor.lock"

# The file of the runtime folder in which the supervisor gives up.
VERDICT_NAME = "verdict.json"


class Verdict(msgspec.Struct, frozen=True):
    """Why the service must end, and with which exit code."""

    code: int
    reason: str


class LogSettings(msgspec.Struct, frozen=True):
    """The logging of a process; the fields mean what they mean in config.py."""

    log_level: str
    log_format: str
    log_file: str | None


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One model process: its socket, its model, and after how long a batch counts as hung."""

    socket_path: str
    model: ModelSettings
    log: LogSettings
    hang_seconds: float

    @property
    def device_path(self) -> Path:
        """Where the process writes the device it runs on, so that a restart asks for that one."""
        return Path(self.socket_path).with_suffix(".device")

    @property
    def failure_path(self) -> Path:
        """Where the process writes why its model cannot be loaded."""
        return Path(self.socket_path).with_suffix(".failure")

    @property
    def heartbeat_path(self) -> Path:
        """The file whose time the process renews for as long as its threads run."""
        return Path(self.socket_path).with_suffix(".heartbeat")


def socket_path(folder: Path, index: int) -> str:
    """The socket of the model process for the device number `index`."""
    return str(folder / f"model-{index}.sock")
