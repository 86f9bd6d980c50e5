"""Token masks of the constrained rows of a batch."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from runner_server.mlx_backend.sampling.mask_rows import mask_words

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from runner_server.mlx_backend.constraints.matcher import RowMatcher

_ALONE_SECONDS = 0.001
"""Time after which threads compute the masks that are left. Most masks take so little that waking
the threads takes longer: 16 of a JSON schema 0.1 ms at a vocabulary of 4,096 and 0.5 ms at 151,936,
but a single one up to 6 ms."""


class TokenMasks:
    """The tokens that can continue the text of each constrained row.

    Args:
        matchers: The matcher of each row.
        vocab_size: Number of token ids.
    """

    def __init__(self, matchers: Sequence[RowMatcher], vocab_size: int) -> None:
        self._matchers = matchers
        self._mask_bytes = 4 * mask_words(vocab_size)
        self._bits = array("B", bytes(self._mask_bytes * len(matchers)))

    def compute(self) -> list[bytes]:
        """Return the mask of each row: one bit for each token, the lowest first, in whole words.

        Computes without the GIL. A matcher that fails excludes all but the end of the text.
        """
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
