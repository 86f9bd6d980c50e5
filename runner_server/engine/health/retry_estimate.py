"""An estimate of when a full queue has a slot again."""

from __future__ import annotations

_MIN_SECONDS, _MAX_SECONDS = 0.1, 60.0

_NEWEST_WEIGHT = 0.2
"""Weight of the latest batch in the moving average of how long a request runs. Rows that run
together end together: a batch that was held up counts as one observation, not many."""


class RetryEstimate:
    """A moving average of how long requests hold a slot."""

    def __init__(self) -> None:
        # Until the first request ends: a second.
        self._mean_seconds = 1.0
        self._count = 0

    def record(self, running_seconds: float, parallel: int) -> None:
        """Add a finished request; the first one replaces the initial guess.

        Args:
            running_seconds: How long it held the slot.
            parallel: Slots of the batch.
        """
        self._count += 1
        weight = max(_NEWEST_WEIGHT / parallel, 1 / self._count)
        self._mean_seconds += weight * (running_seconds - self._mean_seconds)

    def seconds(self, queued: int, parallel: int) -> float:
        """Return how long a queue takes to drain, between 0.1 and 60 s.

        Args:
            queued: Requests in the queue.
            parallel: Slots of the batch.
        """
        expected = self._mean_seconds * queued / parallel
        return min(_MAX_SECONDS, max(_MIN_SECONDS, expected))
