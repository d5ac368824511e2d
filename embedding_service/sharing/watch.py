"""Notices a hang: something that stays as it is for too long, as a process sees it that watches it."""

import time

# Longer between two looks means that the whole machine was paused.
PAUSE_SECONDS = 5.0


class Watch:
    """Times are measured between looks, so a pause of the whole machine does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._value: object = None
        self._since = self._looked = 0.0

    def is_overdue(self, value: object, now: float | None = None) -> bool:
        """Whether the value has been the same for more than `seconds`; None is never overdue."""
        now = time.monotonic() if now is None else now
        paused, self._looked = now - self._looked > PAUSE_SECONDS, now
        if value is None or value != self._value or paused:
            self._value, self._since = value, now
        return now - self._since > self._seconds
