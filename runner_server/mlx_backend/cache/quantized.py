"""Keys and values with 4 or 8 bits, of one row and of the rows of a prefill.

Each token is quantized alone, in groups of 32 or 64 numbers of a head. Its bits therefore do not
depend on how the prompt was cut into chunks, or on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from runner_server.mlx_backend.arrays import copied
from runner_server.mlx_backend.upstream.names import QuantizedKVCache

Parts = tuple[mx.array, ...]
"""Arrays of shape (rows, heads, tokens, ...): keys and values, or the codes, scales and biases of
keys and then those of values."""

GROUP_SIZES = (64, 32)
"""Numbers of a head that share a scale and a bias; the first that divides the heads is used."""


class QuantizedCache(QuantizedKVCache):  # type: ignore[misc]  # mlx_lm has no types
    """The quantized keys and values of one layer.

    Args:
        group_size: One of ``GROUP_SIZES``.
        bits: 4 or 8.
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Parts, Parts]:
        """Append tokens, and return all keys and values quantized.

        Args:
            keys: Shape (rows, heads, tokens, head size).
            values: As ``keys``.
        """
        begin, end = self.offset, self.offset + keys.shape[2]
        parts = quantized(keys, values, self.group_size, self.bits)
        held = parts_of(self)
        if not held or end > held[0].shape[2]:
            held = _with_room(held, parts, begin, self.step)
        for whole, part in zip(held, parts, strict=True):
            whole[..., begin:end, :] = part
        fill(self, held, end)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Parts, Parts]:
        """Return the keys and values of all tokens, quantized."""
        return split(tuple(part[..., : self.offset, :] for part in parts_of(self)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        return sum(part.nbytes for part in parts_of(self))

    @classmethod
    def merge(cls, rows: Sequence[QuantizedCache]) -> QuantizedBatch:
        """Return a copy of rows of equal length for a prefill in one call."""
        return QuantizedBatch.of(rows)


class QuantizedBatch(QuantizedCache):
    """The quantized keys and values of several rows that are prefilled together.

    The rows begin at column 0 and chunks are padded on the right, so that no token attends to the
    padding and the mask of a single row is right.
    """

    _padding: Sequence[int] = ()

    @classmethod
    def of(cls, rows: Sequence[QuantizedCache]) -> QuantizedBatch:
        """Copy rows of equal length."""
        first = rows[0]
        batch = cls(first.group_size, first.bits)
        if first.offset:
            pieces = zip(*(parts_of(row) for row in rows), strict=True)
            parts = tuple(
                mx.concatenate([piece[..., : first.offset, :] for piece in own]) for own in pieces
            )
            fill(batch, parts, first.offset)
        return batch

    def prepare(self, *, right_padding: Sequence[int], **_lengths: Any) -> None:
        """Set the padding of each row's next chunk, in tokens."""
        self._padding = right_padding

    def finalize(self) -> None:
        """End a chunk. No-op, because :meth:`extract` leaves the padding out."""

    def extract(self, slot: int) -> QuantizedCache:
        """Copy a row."""
        row = QuantizedCache(self.group_size, self.bits)
        length = self.offset - (self._padding[slot] if self._padding else 0)
        if parts := parts_of(self):
            fill(row, tuple(copied(part[slot : slot + 1, :, :length]) for part in parts), length)
        return row


def quantized(keys: mx.array, values: mx.array, group_size: int, bits: int) -> Parts:
    """Return the codes, scales and biases of keys, then those of values."""
    return (*_quantized(keys, group_size, bits), *_quantized(values, group_size, bits))


def _quantized(numbers: mx.array, group_size: int, bits: int) -> Parts:
    codes, scales, biases = mx.quantize(numbers, group_size=group_size, bits=bits)
    # MLX gives a group with NaN finite codes, scale and bias: the maximum brings the NaN back.
    most = mx.max(mx.abs(numbers.reshape(*biases.shape, group_size)), axis=-1)
    return codes, scales, biases + 0 * most


def parts_of(cache: Any) -> Parts:
    """Return the arrays of a row's plain or quantized cache; none before the first token."""
    if cache.keys is None:
        return ()
    if isinstance(cache, QuantizedKVCache):
        return (*cache.keys, *cache.values)
    return cache.keys, cache.values


def fill(cache: Any, parts: Parts, length: int) -> None:
    """Set the arrays of a row's plain or quantized cache, which hold ``length`` tokens."""
    cache.keys, cache.values = split(parts) if isinstance(cache, QuantizedKVCache) else parts
    cache.offset = length


def split(parts: Parts) -> tuple[Parts, Parts]:
    """Return keys and values, each as codes, scales and biases."""
    half = len(parts) // 2
    return parts[:half], parts[half:]


def _with_room(held: Parts, like: Parts, length: int, step: int) -> Parts:
    """Return arrays with the first ``length`` tokens and room for as many as ``like`` has."""
    columns = -(-like[0].shape[2] // step) * step
    room = tuple(mx.zeros((*p.shape[:2], columns, p.shape[3]), p.dtype) for p in like)
    if not held:
        return room
    pairs = zip(held, room, strict=True)
    return tuple(mx.concatenate([old[..., :length, :], new], axis=2) for old, new in pairs)
