"""Whose prompt is evaluated next, and how much of it: prefill cut by time.

Between two decode steps prompts get a slice of time. Half of all time belongs to the
prompt with the least left to evaluate, so that a short one does not wait for a long
one, and half to the one that came first, so that a long one is not put off for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

from runner_server.engine.prefill_cost import PrefillCostModel

MIN_SECONDS = 0.03
"""The shortest slice: running streams do not notice a wait of this length."""

MAX_SECONDS = 0.25
"""The longest slice, where a decode step takes no longer: how long a running stream, a
newcomer or a cancel may wait."""

MIN_CHUNK = 32
"""Tokens below which a chunk takes hardly less time: the weights are read for it anyway. On
a 100 M model on two CPU cores 256 tokens take 0.47 s in chunks of 32, 0.36 in chunks of 64
and 0.32 in chunks of 128."""

_GRAIN = 16
"""Chunks are multiples of this many tokens, as far as they have a choice."""

_LEAST_STEPS = 2.0
"""Decode steps that a slice is at least as long as: a step reads the weights once, and a
chunk that is no longer does little more than that."""

_PROMPT_WEIGHT = 8.0
"""What a waiting prompt counts beside a running stream when the time is divided. Of 16 prompts
of 64 tokens that arrive together at a 100 M model on two CPU cores it takes 1.4 s to evaluate
all with 4, and 1.2 s with 8: more of them share a call. A lone one has nothing to share
a call with, so half a place is taken off."""


class PrefillPolicy:
    """Cuts prompts into chunks that fit a slice of time.

    Args:
        max_chunk: Most tokens in one chunk; bounds the memory that evaluating it takes.
    """

    def __init__(self, max_chunk: int) -> None:
        self._max_chunk = max_chunk
        self._cost = PrefillCostModel()
        self._slice = self._left = 0.0
        self._is_first = True
        # Seconds that the oldest prompt is behind the others.
        self._oldest: int | None = None
        self._debt_seconds = 0.0
        self._serves_oldest = True

    def begin_slice(self, decode_seconds: float, decoding: int, waiting: int) -> None:
        """Begins a slice.

        A prompt that waits keeps a batch small, and a small batch takes about as long as a
        large one. So the time is divided as there are prompts and running streams: a lone
        newcomer delays many streams little, and many newcomers are not held up by one.

        Args:
            decode_seconds: What a decode step takes.
            decoding: Rows it decodes.
            waiting: Prompts to evaluate.
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
        """The next row to evaluate and how many of its tokens; None when the slice is over.

        Args:
            remaining: Tokens left to evaluate of each row, in order of arrival.
        """
        if not remaining:
            return None
        oldest = next(iter(remaining))
        shortest = min(remaining, key=remaining.__getitem__)
        if oldest != self._oldest:
            self._oldest, self._debt_seconds = oldest, 0.0
        # A short one begins within a slice, unless the machine needs all of it for a chunk.
        allowed = self._slice if self._is_first else 0.0
        row = oldest if self._debt_seconds > allowed else shortest
        fitting = self._fitting_chunk(self._left)
        if self._is_first and row != oldest and remaining[oldest] > fitting:
            fitting = self._fitting_chunk(self._left / 2)
        if not self._is_first and fitting < min(remaining[row], MIN_CHUNK):
            return None
        self._is_first = False
        self._serves_oldest = row == oldest
        return row, self._cut(remaining[row], max(MIN_CHUNK, fitting))

    @property
    def token_capacity(self) -> int:
        """Tokens for which the slice has time: others may be evaluated beside the next row."""
        return self._cost.tokens_within(self._left) or 0

    def record(self, tokens: int, seconds: float) -> None:
        """Notes how long the chunk of the last turn took."""
        self._left -= seconds
        change = -seconds if self._serves_oldest else seconds
        self._debt_seconds = max(0.0, self._debt_seconds + change)
        self._cost.record(tokens, seconds)

    def _fitting_chunk(self, seconds: float) -> int:
        """Tokens for which there is time, at most a chunk of them."""
        tokens = self._cost.tokens_within(seconds)
        if tokens is None:
            return MIN_CHUNK
        return min(self._max_chunk, tokens // _GRAIN * _GRAIN)

    def _cut(self, tokens: int, fitting: int) -> int:
        """As many as fit, and half as many more if they are the last: no small rest is left."""
        if tokens <= min(fitting * 3 // 2, self._max_chunk):
            return tokens
        return -(-tokens // 2) if tokens < 2 * fitting else fitting
