"""Comparison of two generations whose tokens may diverge at a near-tie."""

from __future__ import annotations

from collections.abc import Sequence

from runner_server.engine.logprobs import TokenLogprob

TOLERANCE = 2e-3
"""In nats: the rounding error of float32, with a margin."""

_LEAST_COMMON = 0.75
"""Least share of the most likely ids in common; rounding can swap ids at the end of the list."""


def difference(
    some: Sequence[TokenLogprob], others: Sequence[TokenLogprob], tolerance: float = TOLERANCE
) -> str | None:
    """Compare log probabilities up to the first token that differs, which must be a near-tie.

    Returns:
        Description of the first difference; None if the generations agree.
    """
    if len(some) != len(others):
        return f"{len(some)} tokens instead of {len(others)}"
    for index, (a, b) in enumerate(zip(some, others, strict=True)):
        found = _token_difference(a, b)
        if found > tolerance:
            return f"log probabilities differ by {found:.2g} at token {index}"
        if a.token_id != b.token_id:
            break
    return None


def _token_difference(a: TokenLogprob, b: TokenLogprob) -> float:
    values, same = dict(a.top), dict(b.top)
    common = set(values) & set(same)
    if len(common) < _LEAST_COMMON * len(values):
        return float("inf")
    largest = max((abs(values[id_] - same[id_]) for id_ in common), default=0.0)
    if a.token_id != b.token_id:
        return max(largest, abs(a.logprob - b.logprob))
    return largest
