"""Sums and rates of the last minute."""

from __future__ import annotations

import time
from collections.abc import Callable

_BUCKETS = 60
"""Buckets of a second, the one under way included, so that a sum covers 59 to 60 seconds."""


class SlidingSum:
    """Sum of the amounts of the last minute, in buckets of a second.

    One thread adds; any thread may read. The methods take the time as seconds of any clock.

    Args:
        now: The time from which amounts count.
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._amounts = [0] * _BUCKETS
        self._seconds = [-1] * _BUCKETS

    def add(self, amount: int, now: float) -> None:
        """Add an amount."""
        second = int(now)
        index = second % _BUCKETS
        if self._seconds[index] != second:
            # In this order, so that a reader never takes an amount of a minute ago for a new one.
            self._amounts[index] = 0
            self._seconds[index] = second
        self._amounts[index] += amount

    def total(self, now: float) -> int:
        """Return the sum."""
        oldest = int(now) - _BUCKETS + 1
        pairs = zip(self._seconds, self._amounts, strict=True)
        return sum(amount for second, amount in pairs if second >= oldest)

    def rate(self, now: float) -> float:
        """Return the sum per second of the time it covers; 0 if that time has just begun."""
        covered = now - max(self._since, int(now) - _BUCKETS + 1)
        return self.total(now) / covered if covered > 0 else 0.0


class RecentWork:
    """Work done for one model in the last minute, or since its load if that is shorter.

    The engine's thread records, and any thread may read.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        now = clock()
        self._generated = SlidingSum(now)
        self._prompt = SlidingSum(now)
        self._cached = SlidingSum(now)

    def note_generated(self, tokens: int) -> None:
        """Record generated tokens."""
        self._generated.add(tokens, self._clock())

    def note_prompt(self, tokens: int, cached: int) -> None:
        """Record the prompt of a request that has reached its first token.

        Args:
            tokens: Tokens of the prompt.
            cached: Those taken from the prefix cache.
        """
        now = self._clock()
        self._prompt.add(tokens, now)
        self._cached.add(cached, now)

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second."""
        return self._generated.rate(self._clock())

    @property
    def cached_ratio(self) -> float:
        """Share of the prompts' tokens taken from the prefix cache; 0 without prompts."""
        now = self._clock()
        return self._cached.total(now) / max(1, self._prompt.total(now))
