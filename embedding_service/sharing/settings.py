"""What the master, the supervisor and the model processes tell each other, as JSON, and their exit codes."""

from pathlib import Path

import msgspec

from embedding_service.inference.settings import ModelSettings
from embedding_service.sharing.runtime_folder import RuntimeFolder

# From sysexits.h: a failure that no restart can fix, and one that a restart may.
EX_CONFIG, EX_SOFTWARE = 78, 70


class ExitReason(msgspec.Struct, frozen=True):
    """Why the service must end, and with which exit code."""

    code: int
    reason: str


class LoadReport(msgspec.Struct, frozen=True):
    """What a model process tells its supervisor once: the device it runs on, or why it has no model."""

    device: str = ""
    failure: str = ""


class LogSettings(msgspec.Struct, frozen=True):
    """The logging of a process; the fields mean what they mean in config.py."""

    log_level: str
    log_format: str
    log_file: str | None


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One model process: its number and folder, its model, and after how long a batch counts as hung."""

    index: int
    runtime_folder: str
    model: ModelSettings
    log: LogSettings
    hang_seconds: float

    @property
    def folder(self) -> RuntimeFolder:
        """The runtime folder shared with the other processes."""
        return RuntimeFolder(Path(self.runtime_folder))

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return self.folder.socket(self.index)

    @property
    def heartbeat_path(self) -> Path:
        """Its heartbeat file."""
        return self.folder.heartbeat(self.index)
