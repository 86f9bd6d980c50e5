"""Log probabilities of the tokens of a prompt, computed chunk by chunk."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from runner_server.engine.logprobs import PromptLogprobs
from runner_server.mlx_backend.sampling.logprobs import token_logprobs


class ChunkLogprobs:
    """Log probabilities of the tokens that follow those of a chunk, possibly unevaluated.

    Args:
        logits: The model's logits for the chunk, shape ``(tokens, vocabulary)``.
        following: The token after each token of the chunk.
        top: Number of likely tokens at each position.
        agree: See ``DecodeBatch``; None if there is one rank.
    """

    def __init__(
        self,
        logits: mx.array,
        following: Sequence[int],
        top: int,
        agree: Callable[[mx.array], mx.array] | None = None,
    ) -> None:
        found = token_logprobs(logits, mx.array(list(following), dtype=mx.int32), top)
        self._following = following
        self._chosen, self._ids, self._values = found.chosen, found.ids, found.values
        # As in `are_finite`, except that a prompt may contain tokens with logits of -inf.
        bounded = mx.sum(logits.astype(mx.float32), axis=-1) < mx.inf
        finite = mx.all(bounded & ~mx.isnan(found.chosen)).astype(mx.uint32)[None]
        # Ranks may see different values, but must decide alike.
        self._finite = agree(finite) if agree else finite

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate."""
        return self._chosen, self._ids, self._values, self._finite

    @property
    def are_finite(self) -> bool:
        """True unless logits are NaN or infinite. Waits for the computation."""
        return bool(self._finite.item())

    def read(self) -> PromptLogprobs:
        """Wait for the computation; return the results."""
        return PromptLogprobs(
            array("i", self._following),
            array("f", cast("list[float]", self._chosen.tolist())),
            array("i", cast("list[int]", self._ids.flatten().tolist())),
            array("f", cast("list[float]", self._values.flatten().tolist())),
        )
