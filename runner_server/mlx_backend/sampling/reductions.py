"""Reductions of logits over the vocabulary, in less time than those of MLX take on a CPU.

MLX reduces the last axis one number after another on a CPU, and any other axis in vectors. So the
vocabulary is folded into a table whose rows are reduced first. CPU time for 16 x 151,936 float32
numbers, folded and not: sum 0.6 and 1.7 ms, position of the maximum 1.2 and 3.4 ms (Intel Xeon).
"""

from __future__ import annotations

import mlx.core as mx

_DEPTH = 128
"""Rows of a table."""

_BLOCKS, _BLOCK_DEPTH = 64, 16
"""Tables for the position of the maximum, and rows of each: only one table is searched for it."""

_MIN_SIZE = 16_384
"""Size of a vocabulary from which folding pays."""


def total(logits: mx.array) -> mx.array:
    """Return the sum of each row of logits, shape ``(rows,)``."""
    if not _folds(logits):
        return mx.sum(logits, axis=-1)
    tables, rest = _folded(logits, 1, _DEPTH)
    return mx.sum(mx.sum(tables, axis=2), axis=(1, 2)) + mx.sum(rest, axis=-1)


def argmax(logits: mx.array) -> mx.array:
    """Return the id of the largest logit of each row, the lowest of equals, shape ``(rows,)``."""
    if not _folds(logits):
        return mx.argmax(logits, axis=-1)
    tables, rest = _folded(logits, _BLOCKS, _BLOCK_DEPTH)
    most = mx.max(mx.max(tables, axis=2), axis=-1)
    block = mx.argmax(most, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(tables.flatten(2), block[:, :, None], axis=1)[:, 0]
    ids = block[:, 0] * chosen.shape[-1] + mx.argmax(chosen, axis=-1)
    if not rest.size:
        return ids
    is_later = mx.max(rest, axis=-1) > mx.max(most, axis=-1)
    return mx.where(is_later, logits.shape[-1] - rest.shape[-1] + mx.argmax(rest, axis=-1), ids)


def _folds(logits: mx.array) -> bool:
    # A GPU has parallel kernels for the last axis. A CPU converts each float16 number apart.
    is_on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return is_on_cpu and logits.shape[-1] >= _MIN_SIZE and logits.dtype != mx.float16


def _folded(logits: mx.array, blocks: int, depth: int) -> tuple[mx.array, mx.array]:
    """Return tables with all but the last numbers of each row, and these last ones.

    Returns:
        Shapes ``(rows, blocks, depth, width)`` and ``(rows, less than blocks * depth)``.
    """
    count, size = logits.shape
    width = size // (blocks * depth)
    end = blocks * depth * width
    return logits[:, :end].reshape(count, blocks, depth, width), logits[:, end:]
