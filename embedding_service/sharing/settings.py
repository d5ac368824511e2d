"""What the master, the supervisor and the model processes tell each other, as JSON, and their exit codes."""

import msgspec

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
