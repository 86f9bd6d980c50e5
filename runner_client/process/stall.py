"""Tells an engine that stands still from one that is slow, and from one without work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner_client.types import State

if TYPE_CHECKING:
    from runner_client.types import Status

_LOOKS_PER_LIMIT = 4
_MAX_LOOK_SECONDS = 5.0


class StallDetector:
    """Judges by what the engine tells of itself; a status that cannot be had is no proof.

    The engine makes a step for every slice of a prompt and for every token, and tells
    no age while it has nothing to do or only readers that are behind. A load has a
    limit of its own (``Timeouts.load_seconds``).

    Args:
        limit_seconds: How old the last movement may be.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._stands_at: int | None = None

    @property
    def look_seconds(self) -> float:
        """How often to look."""
        return min(_MAX_LOOK_SECONDS, self.limit_seconds / _LOOKS_PER_LIMIT)

    def observe(self, status: Status) -> str | None:
        """Takes note of a status.

        Returns:
            In words, that the engine stands still; None if it does not. Two looks must
            agree: a process that was stopped for a while and goes on looks like one that
            stands still, once.
        """
        age = status.last_progress_age_seconds
        if status.state is not State.ACTIVE or age is None or age < self.limit_seconds:
            self._stands_at = None
            return None
        before, self._stands_at = self._stands_at, status.step_count
        if before != status.step_count:
            return None
        return (
            f"its engine had {status.running_count} completions and had not moved for {age:.1f} s "
            f"(Timeouts.stall_seconds is {self.limit_seconds:g})"
        )
