"""Drawing of the next tokens from a step's logits, as the options of each row ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from runner_server.engine.types import Sampling
from runner_server.mlx_backend.in_flight import InFlightStep
from runner_server.mlx_backend.sampling.constrained import ConstrainedSampler
from runner_server.mlx_backend.sampling.end_mask import EndMask
from runner_server.mlx_backend.sampling.logprobs import are_finite
from runner_server.mlx_backend.sampling.penalties import Penalties
from runner_server.mlx_backend.sampling.row_logprobs import BatchLogprobs, RowLogprobs, arrays_of
from runner_server.mlx_backend.sampling.sampler import Sampler

Agree = Callable[[mx.array], mx.array]
"""Replaces tokens drawn on this rank with those of rank 0, unevaluated; same shape and dtype."""


class Drawing:
    """Draws one token for each row of logits.

    Args:
        options: The sampling options of each row.
        sampler: Draws a token from the logits of each row, after the penalties.
        agree: Replaces drawn tokens with those of rank 0; None if there is one rank.
    """

    def __init__(
        self,
        options: Sequence[Sampling],
        sampler: Sampler | ConstrainedSampler,
        agree: Agree | None,
    ) -> None:
        self._penalties = Penalties(options)
        self._end_mask = EndMask(options)
        self._sampler = sampler
        self._logprobs = BatchLogprobs(options)
        self._agree = agree

    def __call__(
        self,
        logits: mx.array,
        histories: Sequence[Sequence[int]],
        inputs: mx.array,
        drawn: Sequence[int],
    ) -> tuple[InFlightStep, list[RowLogprobs | None]]:
        """Launch the drawing of a token for each row, and the log probabilities requested.

        Args:
            logits: The model's logits, shape ``(rows, vocabulary)``.
            histories: The tokens of each row before its input.
            inputs: The token of each row that the logits follow, shape ``(rows,)``.
            drawn: Number of tokens drawn in each row, including its input.

        Returns:
            The tokens, and the log probabilities of the rows that request them.
        """
        changed = self._penalties(logits, histories, inputs, drawn)
        changed = self._end_mask(changed, drawn)
        tokens = self._sampler(changed, drawn)
        step = self._settled(tokens, are_finite(logits, tokens))
        logprobs = self._logprobs(logits, step.tokens)
        mx.async_eval(step.tokens, step.finite, [arrays_of(found) for found in logprobs])
        return step, logprobs

    def _settled(self, drawn: mx.array, finite: mx.array) -> InFlightStep:
        """Return the tokens for every rank to continue with; 0 for a row with non-finite logits."""
        # Candidates among NaN logits may have ids outside the vocabulary.
        drawn = mx.where(finite, drawn, 0)
        if self._agree:
            agreed = self._agree(mx.concatenate([drawn, finite.astype(drawn.dtype)]))
            drawn, flags = mx.split(agreed, 2)
            finite = flags > 0
        return InFlightStep(drawn, finite)
