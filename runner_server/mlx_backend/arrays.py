"""Small arrays with one entry for each row of a batch, and copies."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def row_array(values: Sequence[float], dtype: mx.Dtype = mx.float32) -> mx.array:
    """[n, 1], so that it meets [n, vocabulary]."""
    return mx.array(list(values), dtype=dtype)[:, None]


def rows_of(indices: Sequence[int], count: int) -> mx.array | None:
    """An index of rows; None where it would take all ``count`` of them."""
    return None if len(indices) == count else mx.array(list(indices), dtype=mx.int32)


def copied(value: mx.array) -> mx.array:
    """The same in memory of its own: a copy that MLX need not make, it does not make.

    A view, and what ``mx.contiguous`` gives, may keep a much larger array alive.
    """
    return value * mx.array(1, dtype=value.dtype)
