"""How long a chunk of a prompt takes, learnt from those before it."""

from __future__ import annotations

_KEPT = 0.8
"""What an observation counts after each later one: the last few matter, as a token of a long
prompt takes longer than one of a short prompt."""

_MOST_CONSTANT = 0.6
"""Most of an average chunk's time that is taken for its constant part. That grows with what
chunks of different sizes show, but later chunks of a prompt are slower ones as well."""


class PrefillCostModel:
    """Fits ``seconds = constant + tokens * per_token`` to chunks: the weights are read for any.

    A weighted least-squares fit, in which older chunks count less.
    """

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = 0.0
        self._variance = self._covariance = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Learns from a chunk that took so long."""
        self._weight = self._weight * _KEPT + 1
        # West's update of weighted means and central moments; subtracting sums of squares
        # would lose what is left of equal chunks.
        share = 1 / self._weight
        more_tokens, more_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * more_tokens
        self._seconds += share * more_seconds
        self._variance = (1 - share) * (self._variance + share * more_tokens**2)
        self._covariance = (1 - share) * (self._covariance + share * more_tokens * more_seconds)

    def tokens_within(self, seconds: float) -> int | None:
        """Tokens that take so long; None before the first chunk."""
        if not self._weight:
            return None
        constant = self._constant()
        per_token = max(self._seconds - constant, 1e-9) / self._tokens
        return max(0, int((seconds - constant) / per_token))

    def _constant(self) -> float:
        """Seconds of a chunk without tokens; none until chunks of two sizes were seen."""
        if self._variance < 1:
            return 0.0
        constant = self._seconds - self._covariance / self._variance * self._tokens
        return min(max(0.0, constant), _MOST_CONSTANT * self._seconds)
