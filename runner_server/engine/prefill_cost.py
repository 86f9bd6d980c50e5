"""Prediction of the time of a prefill chunk, fitted to earlier chunks."""

from __future__ import annotations

_KEPT = 0.8
"""Decay of a chunk's weight with each later chunk. The last few dominate, because a token late in
a long prompt takes longer than one in a short prompt."""

_MOST_CONSTANT = 0.6
"""Largest share of an average chunk's time attributed to the constant part. The fit would attribute
more where chunks later in a prompt, which are slower, also differ in size."""


class PrefillCostModel:
    """Fits ``seconds = constant + tokens * per_token`` to prefill chunks.

    The constant is the time to read the weights, which any chunk needs. The fit is weighted least
    squares in which older chunks count less.
    """

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = 0.0
        self._variance = self._covariance = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Add the time of a chunk to the fit."""
        self._weight = self._weight * _KEPT + 1
        # West's update of weighted means and central moments. Differences of sums of squares
        # would lose precision on chunks of equal size.
        share = 1 / self._weight
        more_tokens, more_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * more_tokens
        self._seconds += share * more_seconds
        self._variance = (1 - share) * (self._variance + share * more_tokens**2)
        self._covariance = (1 - share) * (self._covariance + share * more_tokens * more_seconds)

    def tokens_within(self, seconds: float) -> int | None:
        """Return the tokens to prefill in a given time; None before the first chunk."""
        if not self._weight:
            return None
        constant = self._constant()
        per_token = max(self._seconds - constant, 1e-9) / self._tokens
        return max(0, int((seconds - constant) / per_token))

    def _constant(self) -> float:
        """Return the constant part in seconds; 0 until chunks of two sizes were recorded."""
        if self._variance < 1:
            return 0.0
        constant = self._seconds - self._covariance / self._variance * self._tokens
        return min(max(0.0, constant), _MOST_CONSTANT * self._seconds)
