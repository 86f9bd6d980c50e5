"""Progress of the engine: steps, and the time since the last progress."""

from __future__ import annotations

import time


class Heartbeat:
    """Progress recorded on the engine's thread, for any thread to read.

    Attributes:
        step_count: Work items run since the start.
        is_idle: Whether the engine waits for a command. No progress is expected then, even if
            there are preempted requests.
    """

    def __init__(self) -> None:
        self.step_count = 0
        self.is_idle = True
        self._last = time.monotonic()

    def beat(self) -> None:
        """Record progress."""
        self._last = time.monotonic()

    def step(self) -> None:
        """Record a finished work item."""
        self.step_count += 1
        self.beat()

    def set_idle(self, *, is_idle: bool) -> None:
        """Record the beginning or the end of a wait for commands."""
        self.is_idle = is_idle
        self.beat()

    def age(self) -> float:
        """Return the seconds since the last progress."""
        return time.monotonic() - self._last
