"""Helpers for small arrays with one entry per row, and copies."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def row_array(values: Sequence[float], dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return the values as a column of shape ``(n, 1)``, to broadcast over a vocabulary."""
    return mx.array(list(values), dtype=dtype)[:, None]


def rows_of(indices: Sequence[int], count: int) -> mx.array | None:
    """Return an index array for selecting rows; None for a selection of every row."""
    return None if len(indices) == count else mx.array(list(indices), dtype=mx.int32)


def copied(value: mx.array) -> mx.array:
    """Return a copy in new memory, by a multiplication MLX does not optimize away.

    A view, or the result of ``mx.contiguous``, may keep a much larger array alive.
    """
    return value * mx.array(1, dtype=value.dtype)
