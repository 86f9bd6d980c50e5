"""Estimate of the time until a full queue can take a request."""

from __future__ import annotations

_MIN_SECONDS, _MAX_SECONDS = 0.1, 60.0

_NEWEST_WEIGHT = 0.2
"""Weight of a whole batch in the moving average, divided among its rows. They end at about the same
time, so one slow batch must count as one observation and not as many."""


class RetryEstimate:
    """Moving average of the time requests occupy a slot."""

    def __init__(self) -> None:
        # A guess until the first request ends.
        self._mean_seconds = 1.0
        self._count = 0

    def record(self, running_seconds: float, parallel: int) -> None:
        """Add a finished request; the first one replaces the initial guess.

        Args:
            running_seconds: Time that the request occupied its slot.
            parallel: Slots of the batch.
        """
        self._count += 1
        weight = max(_NEWEST_WEIGHT / parallel, 1 / self._count)
        self._mean_seconds += weight * (running_seconds - self._mean_seconds)

    def seconds(self, queued: int, parallel: int) -> float:
        """Return the seconds a queue takes to drain, between 0.1 and 60.

        Args:
            queued: Requests in the queue.
            parallel: Slots of the batch.
        """
        expected = self._mean_seconds * queued / parallel
        return min(_MAX_SECONDS, max(_MIN_SECONDS, expected))
