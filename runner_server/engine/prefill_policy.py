"""Prefill policy: whose prompt runs next, and in chunks of what size.

Between two decode steps, prompts get a slice of time. Half of it belongs to the prompt with the
fewest remaining tokens, so that a short prompt does not wait for a long one, and half to the
prompt that arrived first, so that a long prompt is not postponed indefinitely.

For example, on a machine that prefills 2,000 tokens a second, with streams whose decode step takes
5 ms, prompt 0 of 4,000 tokens and prompt 1 of 40 tokens arrive:

1. A slice of 30 ms is about 60 tokens. Prompt 1 is the shortest: its 40 tokens run, and prompt 0
   is 20 ms behind.
2. The remaining 10 ms fit fewer than 32 tokens, so the slice is over and a decode step runs.
3. Prompt 0 gets the next slices, 48 tokens in each. If more short prompts arrive, they and prompt 0
   take turns, because prompt 0 is never more than a slice behind them.
"""

from __future__ import annotations

from collections.abc import Mapping

MIN_SECONDS = 0.03
"""The shortest slice: readers of running streams do not notice a pause of this length."""

MAX_SECONDS = 0.25
"""The longest slice unless a decode step takes longer; it delays running streams, new requests and
cancellations."""

MIN_CHUNK = 32
"""Tokens below which a shorter chunk is hardly faster, because it reads all weights anyway. On
a 100 M model on two CPU cores 256 tokens take 0.47 s in chunks of 32, 0.36 in chunks of 64
and 0.32 in chunks of 128."""

_GRAIN = 16
"""Chunks are multiples of this number of tokens where the prompt allows it."""

_LEAST_STEPS = 2.0
"""Shortest slice, in decode steps. A chunk that takes as long as one step does little more than
read the weights."""

_PROMPT_WEIGHT = 8.0
"""Weight of a waiting prompt relative to a running stream when time is divided. On a 100 M model on
two CPU cores, 16 prompts of 64 tokens that arrive together are prefilled in 1.4 s with a weight of
4 and in 1.2 s with 8, because more of them share a call. A single prompt shares its call with no
other, so half a prompt is subtracted."""


_KEPT = 0.8
"""Factor on the weight of a chunk for each later chunk. The latest few dominate, because a token
late in a long prompt takes longer than one in a short prompt."""

_MOST_CONSTANT = 0.6
"""Largest share of an average chunk's time attributed to the constant part. The fit would attribute
more where chunks later in a prompt, which are slower, also differ in size."""


class PrefillPolicy:
    """Chooses prompts and cuts them into chunks that fit a slice of time.

    Args:
        max_chunk: Most tokens in one chunk; bounds its working memory.
    """

    def __init__(self, max_chunk: int) -> None:
        self._max_chunk = max_chunk
        self._min_chunk = min(MIN_CHUNK, max_chunk)
        self._cost = PrefillCostModel()
        self._slice = self._left = 0.0
        self._is_first = True
        # Seconds of prefill by which the oldest prompt is behind the others.
        self._oldest: int | None = None
        self._debt_seconds = 0.0
        self._serves_oldest = True

    def begin_slice(self, decode_seconds: float, decoding: int, waiting: int) -> None:
        """Begin a slice.

        A waiting prompt keeps the batch small, and a step of a small batch takes about as long
        as one of a large batch. Time is therefore divided in proportion to waiting prompts and
        running streams: one new prompt delays many streams only a little, and one stream does
        not delay many prompts.

        Args:
            decode_seconds: Time of a decode step.
            decoding: Rows in a decode step.
            waiting: Prompts to prefill.
        """
        if decoding:
            share = decode_seconds * _PROMPT_WEIGHT * (waiting - 0.5) / decoding
            most = max(MAX_SECONDS, _LEAST_STEPS * decode_seconds)
            self._slice = min(most, max(MIN_SECONDS, _LEAST_STEPS * decode_seconds, share))
        else:
            self._slice = MAX_SECONDS
        self._left = self._slice
        self._is_first = True

    def next(self, remaining: Mapping[int, int]) -> tuple[int, int] | None:
        """Choose the next row and the size of its chunk.

        Args:
            remaining: Tokens left to prefill of each row, in order of arrival.

        Returns:
            The row and the number of tokens; None when the slice is over.
        """
        if not remaining:
            return None
        oldest = next(iter(remaining))
        shortest = min(remaining, key=remaining.__getitem__)
        if oldest != self._oldest:
            self._oldest, self._debt_seconds = oldest, 0.0
        # The first chunk may go to the shortest prompt while the oldest is at most a slice behind,
        # so that a short prompt begins within one slice.
        allowed = self._slice if self._is_first else 0.0
        row = oldest if self._debt_seconds > allowed else shortest
        fitting = self._fitting_chunk(self._left)
        if self._is_first and row != oldest and remaining[oldest] > fitting:
            fitting = self._fitting_chunk(self._left / 2)
        if not self._is_first and fitting < min(remaining[row], self._min_chunk):
            return None
        self._is_first = False
        self._serves_oldest = row == oldest
        return row, self._cut(remaining[row], max(self._min_chunk, fitting))

    @property
    def token_capacity(self) -> int:
        """Tokens that fit the rest of the slice, over all prompts in the same call."""
        return self._cost.tokens_within(self._left) or 0

    def record(self, tokens: int, seconds: float) -> None:
        """Record the time of the chunk chosen last."""
        self.spend(seconds)
        self._cost.record(tokens, seconds)

    def spend(self, seconds: float) -> None:
        """Record time spent for the row chosen last, but not on the tokens of a chunk."""
        self._left -= seconds
        change = -seconds if self._serves_oldest else seconds
        self._debt_seconds = max(0.0, self._debt_seconds + change)

    def _fitting_chunk(self, seconds: float) -> int:
        """Return the size of a chunk taking ``seconds``, at most ``max_chunk``."""
        tokens = self._cost.tokens_within(seconds)
        if tokens is None:
            return self._min_chunk
        return min(self._max_chunk, tokens // _GRAIN * _GRAIN)

    def _cut(self, tokens: int, fitting: int) -> int:
        """Return the size of a chunk, up to half more than fits if that ends the prompt."""
        if tokens <= min(fitting * 3 // 2, self._max_chunk):
            return tokens
        return -(-tokens // 2) if tokens < 2 * fitting else fitting


class PrefillCostModel:
    """Fits ``seconds = constant + tokens * per_token`` to prefill chunks.

    The constant is mostly the time to read the weights. The fit is by least squares, with less
    weight on older chunks.
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
        """Return the number of tokens prefilled in ``seconds``; None before the first chunk."""
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
