"""Seeded noise for sampling.

The noise is a function of the request's seed, the token's position and the token's id. It depends
neither on MLX's random state, which each thread has separately and an exception can corrupt, nor on
a token's index among the candidates, which rounding may change between a batch and a single row.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, cast

import mlx.core as mx

_LOW_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _words(values: Iterable[int]) -> mx.array:
    """Return 64-bit words. Not from a list, in which MLX accepts no integer of 2^63 or more."""
    return mx.array(cast("Any", memoryview(array("Q", values))))


_WORD_GOLDEN, _WORD_1, _WORD_2 = _words([_GOLDEN]), _words([_MIX_1]), _words([_MIX_2])


def negative_gumbel(seeds: Sequence[int], positions: Sequence[int], ids: mx.array) -> mx.array:
    """Return noise for each row and id: float32, shape ``(rows, n)``.

    The negated noise has a Gumbel distribution. The bits are splitmix64's
    (https://prng.di.unimi.it/splitmix64.c): its output for seed and position is the state of a
    generator whose outputs are numbered by id.

    Args:
        seeds: The seed of each row.
        positions: The position of each row's next token.
        ids: Token ids, shape ``(rows, n)``, or ``(1, n)`` for the same ids in all rows.
    """
    pairs = zip(seeds, positions, strict=True)
    states = (_splitmix(seed + (position + 1) * _GOLDEN) for seed, position in pairs)
    first = _words((state + _GOLDEN) & _LOW_64 for state in states)
    bits = _mix(first[:, None] + ids.astype(mx.uint64) * _WORD_GOLDEN)
    # 23 bits plus one half: float32 represents every such number exactly, and none is 0 or 1.
    uniform = ((bits >> 41).astype(mx.float32) + 0.5) * 2.0**-23
    return mx.log(-mx.log(uniform))


def _splitmix(state: int) -> int:
    state &= _LOW_64
    state = ((state ^ (state >> 30)) * _MIX_1) & _LOW_64
    state = ((state ^ (state >> 27)) * _MIX_2) & _LOW_64
    return state ^ (state >> 31)


def _mix(state: mx.array) -> mx.array:
    """Apply :func:`_splitmix` to an array of states."""
    state = (state ^ (state >> 30)) * _WORD_1
    state = (state ^ (state >> 27)) * _WORD_2
    return state ^ (state >> 31)
