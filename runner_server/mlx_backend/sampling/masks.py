"""Token masks of the constrained rows of a batch."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx

from runner_server.mlx_backend.sampling.mask_rows import MaskRows, mask_words

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from runner_server.mlx_backend.constraints.matcher import RowMatcher

_ALONE_SECONDS = 0.001
"""Time after which threads compute the masks that are left. Most masks take so little that waking
the threads takes longer: 16 of a JSON schema 0.1 ms at a vocabulary of 4,096 and 0.5 ms at 151,936,
but a single one up to 6 ms."""


class TokenMasks:
    """Excludes the tokens that cannot continue the text of each constrained row.

    Args:
        matchers: The matcher of each row; None for a row without a constraint.
        vocab_size: Number of token ids.
        mask_rows: Turns masks into what they add to logits.
    """

    def __init__(
        self, matchers: Sequence[RowMatcher | None], vocab_size: int, mask_rows: MaskRows
    ) -> None:
        self._matchers = [matcher for matcher in matchers if matcher]
        self._is_free = [matcher is None for matcher in matchers]
        self._mask_rows = mask_rows
        self._mask_bytes = 4 * mask_words(vocab_size)
        self._everything = b"\xff" * self._mask_bytes
        self._bits = array("B", bytes(self._mask_bytes * len(self._matchers)))

    def __bool__(self) -> bool:
        """Return True if there is a constrained row."""
        return bool(self._matchers)

    def __call__(self, logits: mx.array) -> mx.array:
        """Return logits that are -inf for excluded tokens, shape ``(rows, vocabulary)``.

        Computes the masks meanwhile, without the GIL. The matchers must have consumed all tokens of
        their rows. A matcher that fails excludes all but the end of the text.
        """
        masks = iter(self._masks())
        # Rows without a constraint take part: to change only the others would take five times as
        # long (15 of 16 rows of 151,936 on a CPU: 23 ms, against 4).
        of_rows = [self._everything if is_free else next(masks) for is_free in self._is_free]
        return logits + self._mask_rows(of_rows, logits.dtype)

    def _masks(self) -> list[bytes]:
        """Return the mask of each constrained row."""
        numbered = list(enumerate(self._matchers))
        size = self._mask_bytes
        self._compute([(each.inner, number) for number, each in numbered if each.inner])
        for number, each in numbered:
            begin = number * size
            if each.mask is not None:
                self._bits[begin : begin + size] = array("B", each.mask.tobytes())
            if each.also is not None:
                byte, bit = divmod(each.also, 8)
                self._bits[begin + byte] |= 1 << bit
        bits = memoryview(self._bits)
        return [bytes(bits[size * number : size * (number + 1)]) for number, _ in numbered]

    def _compute(self, matchers: Sequence[tuple[LLMatcher, int]]) -> None:
        """Compute the masks of numbered matchers: the first ones here, the others in parallel."""
        address, _ = self._bits.buffer_info()
        size = self._mask_bytes
        began = time.perf_counter()
        for index, (matcher, number) in enumerate(matchers):
            if time.perf_counter() - began > _ALONE_SECONDS:
                rest = list(matchers[index:])
                _executor().unsafe_compute_mask_ptr(rest, address, size, len(self._matchers))
                return
            matcher.unsafe_compute_mask_ptr(address + number * size, size)


@cache
def _executor() -> LLExecutor:
    """Return the threads that compute masks."""
    import llguidance  # noqa: PLC0415 - the server works without it

    return llguidance.LLExecutor()
