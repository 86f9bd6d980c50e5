"""Small arrays with one entry for each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def row_array(values: Sequence[float], dtype: mx.Dtype = mx.float32) -> mx.array:
    """[n, 1], so that it meets [n, vocabulary]."""
    return mx.array(list(values), dtype=dtype)[:, None]


def rows_of(places: Sequence[int], count: int) -> mx.array | None:
    """An index of rows; None where it would take all ``count`` of them."""
    return None if len(places) == count else mx.array(list(places), dtype=mx.int32)
