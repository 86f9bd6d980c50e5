"""Log probabilities of drawn tokens, and the check that logits are finite."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner_server.mlx_backend.sampling.reductions import total
from runner_server.mlx_backend.sampling.selection import largest


def are_finite(logits: mx.array, drawn: mx.array) -> mx.array:
    """Return whether each row's logits are finite; -inf is allowed for masked tokens.

    On every device a sum is NaN or infinite if any term is, and it is faster than a search for the
    maximum. A row draws a masked token only if all of its logits are -inf.

    Args:
        logits: Shape ``(rows, vocabulary)``.
        drawn: The token of each row; any number if the logits are not finite.

    Returns:
        Booleans, shape ``(rows,)``.
    """
    if logits.dtype == mx.float16:
        # A float16 sum can overflow even if no term does.
        logits = logits.astype(mx.float32)
    bounded = total(logits) < mx.inf
    chosen = mx.take_along_axis(logits, mx.where(bounded, drawn, 0)[:, None], axis=-1)[:, 0]
    return bounded & (chosen > -mx.inf)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of the drawn tokens of some rows. The arrays may be unevaluated.

    Attributes:
        chosen: Log probability of the drawn token, shape ``(rows,)``.
        ids: The most likely ids, most likely first, shape ``(rows, n)``.
        values: Log probabilities of ``ids``, shape ``(rows, n)``.
        candidates: Log probabilities of given ids, shape ``(rows, m)``.
    """

    chosen: mx.array
    ids: mx.array
    values: mx.array
    candidates: mx.array


def token_logprobs(
    logits: mx.array, tokens: mx.array, top: int, candidates: mx.array | None = None
) -> TokenLogprobs:
    """Return the log probabilities of drawn tokens, of the ``top`` most likely ones and of others.

    Args:
        logits: The model's logits, shape ``(rows, vocabulary)``.
        tokens: The drawn tokens, shape ``(rows,)``.
        top: Number of alternatives; 0 for none.
        candidates: The other ids, shape ``(rows, m)``; None for none.
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)

    def of(ids: mx.array) -> mx.array:
        return mx.minimum(mx.take_along_axis(logits, ids, axis=-1) - total, 0.0)

    nothing = mx.zeros((logits.shape[0], 0))
    chosen = of(tokens[:, None].astype(mx.int32))[:, 0]
    others = nothing if candidates is None else of(candidates)
    if not top:
        return TokenLogprobs(chosen, nothing.astype(mx.int32), nothing, others)
    ids, values = largest(logits, top)
    order = mx.argsort(-values, axis=-1)
    values = mx.take_along_axis(values, order, axis=-1) - total
    ids = mx.take_along_axis(ids, order, axis=-1)
    return TokenLogprobs(chosen, ids, mx.minimum(values, 0.0), others)
