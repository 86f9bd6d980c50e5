"""Whose prompt is evaluated next, and how much of it: prefill cut by time.

Between two decode steps prompts get a slice of time. Half of all time belongs to the
prompt with the least left to evaluate, so that a short one does not wait for a long
one, and half to the one that came first, so that a long one is not put off for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

SLICE_SECONDS = 0.04
"""How long running streams wait for prompts at a time, about."""

ALONE_SECONDS = 0.25
"""The same while nothing is decoded: how long a newcomer and a cancel may wait."""

_FIRST_CHUNK = 64
"""Tokens in the first chunk, before the pace is known."""

_GRAIN = 16
"""Chunks are multiples of this many tokens: fewer give a processor too little to do."""

_WORTHWHILE = 64
"""A slice ends when it has no time left for as many tokens, or for the rest of a prompt."""

_NEWEST_WEIGHT = 0.3
"""Share of the latest chunk in the moving average of the pace."""


class PrefillTurns:
    """Cuts prompts into chunks that fit a slice of time.

    Args:
        max_chunk: Most tokens in one chunk; bounds the memory that evaluating it takes.
    """

    def __init__(self, max_chunk: int) -> None:
        self._max_chunk = max_chunk
        self._pace: float | None = None
        self._slice = self._left = 0.0
        self._is_first = True
        # Seconds that the oldest prompt is behind the others.
        self._owed = 0.0
        self._serves_oldest = True

    def begin(self, decode_seconds: float | None) -> None:
        """Begins a slice.

        Args:
            decode_seconds: What a decode step takes; None while nothing is decoded. A
                slice is never shorter, so that prompts get half of the time at least.
        """
        busy = decode_seconds is not None
        self._slice = max(SLICE_SECONDS, decode_seconds or 0) if busy else ALONE_SECONDS
        self._left = self._slice
        self._is_first = True

    def next(self, remaining: Mapping[int, int]) -> tuple[int, int] | None:
        """The next row to evaluate and how many of its tokens; None when the slice is over.

        Args:
            remaining: Tokens left to evaluate of each row, in order of arrival.
        """
        if not remaining:
            return None
        oldest = next(iter(remaining))
        shortest = min(remaining, key=remaining.__getitem__)
        if oldest == shortest:
            self._owed = 0.0
        # A short one begins within a slice, unless the machine needs all of it for a chunk.
        allowed = self._slice if self._is_first else 0.0
        row = oldest if self._owed > allowed else shortest
        shares = self._is_first and row != oldest
        fitting = self._fitting(self._left / 2 if shares else self._left)
        if not self._is_first and fitting < min(remaining[row], _WORTHWHILE):
            return None
        self._is_first = False
        self._serves_oldest = row == oldest
        return row, min(remaining[row], max(_GRAIN, fitting))

    def spent(self, tokens: int, seconds: float) -> None:
        """Notes how long the chunk of the last turn took."""
        self._left -= seconds
        self._owed = max(0.0, self._owed + (-seconds if self._serves_oldest else seconds))
        pace = tokens / max(seconds, 1e-6)
        if self._pace is None:
            self._pace = pace
        else:
            self._pace += _NEWEST_WEIGHT * (pace - self._pace)

    def _fitting(self, seconds: float) -> int:
        """Tokens for which there is time, at most a chunk of them."""
        if self._pace is None:
            return _FIRST_CHUNK
        tokens = int(self._pace * seconds) // _GRAIN * _GRAIN
        return min(self._max_chunk, tokens)
