"""Detection of a stalled engine, as opposed to a slow or an idle one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner_client.types import State

if TYPE_CHECKING:
    from runner_client.types import Status

_LOOKS_PER_LIMIT = 4
_MAX_LOOK_SECONDS = 5.0


class StallDetector:
    """Detector of a stalled engine, based on consecutive statuses.

    The engine makes a step for every chunk of a prompt and for every token, and reports no age
    while idle or while only slow readers hold it up. A failed status call is not evidence of a
    stall. Loads have their own limit (``Timeouts.load_seconds``).

    Args:
        limit_seconds: The maximum age of the last progress.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._stands_at: int | None = None

    @property
    def look_seconds(self) -> float:
        """The interval between two observations."""
        return min(_MAX_LOOK_SECONDS, self.limit_seconds / _LOOKS_PER_LIMIT)

    def observe(self, status: Status) -> str | None:
        """Record a status.

        Returns:
            A description of the stall; None if there is none. Two consecutive observations must
            agree, because a process that was suspended and resumed looks stalled once.
        """
        age = status.last_progress_age_seconds
        is_up = status.state in (State.ACTIVE, State.DRAINING)
        if not is_up or age is None or age < self.limit_seconds:
            self._stands_at = None
            return None
        before, self._stands_at = self._stands_at, status.step_count
        if before != status.step_count:
            return None
        return (
            f"its engine had {status.running_count} completions and made no progress for "
            f"{age:.1f} s (Timeouts.stall_seconds is {self.limit_seconds:g})"
        )
