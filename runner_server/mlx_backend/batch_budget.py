"""Memory limits of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from runner_common.contract import MAX_PARALLEL


@dataclass(frozen=True)
class BatchBudget:
    """Memory limits of a batch, in addition to the weights.

    Attributes:
        budget_bytes: Most bytes for the caches of all rows.
        working_bytes: Most bytes for the working memory of a chunk or a step.
        row_bytes: Returns the bytes of one row's caches, given its number of tokens.
        chunk_bytes: Returns the working memory of a chunk in bytes, given its number of tokens and
            the number already in the caches.
        buffer_bytes: Most bytes of freed buffers that MLX keeps for reuse.
    """

    budget_bytes: float = math.inf
    working_bytes: float = math.inf
    row_bytes: Callable[[int], int] = field(default=lambda _: 0)
    chunk_bytes: Callable[[int, int], float] = field(default=lambda _tokens, _before: 0.0)
    buffer_bytes: float = math.inf

    def max_prompts_together(self, length: int, before: int) -> int:
        """Return the most prompts to prefill in one call.

        Args:
            length: Tokens to prefill of each prompt.
            before: Tokens already in the caches of each prompt.
        """
        # The caches are copied into a batch, grow there, and are copied out again.
        copies = 3 * self.row_bytes(before + length)
        cost = self.chunk_bytes(length, before) + copies
        return int(min(MAX_PARALLEL, self.working_bytes / max(cost, 1)))

    def max_texts_together(self, length: int) -> int:
        """Return the most texts of ``length`` tokens to embed in one call, without caches."""
        return int(min(MAX_PARALLEL, self.working_bytes / max(self.chunk_bytes(length, 0), 1)))
