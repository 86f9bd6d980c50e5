"""Keys and values of a batch, which rows join and leave without a copy of the other rows.

mlx_lm copies its whole batched cache whenever a row joins or leaves. A :class:`SlotCache` writes a
new row into a free slot, and moves the last row to the slot of a row that leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from runner_server.mlx_backend.arrays import copied
from runner_server.mlx_backend.cache.quantized import (
    Parts,
    QuantizedCache,
    fill,
    parts_of,
    quantized,
    split,
)
from runner_server.mlx_backend.upstream.names import KVCache, create_causal_mask

_STEP = 256
"""Number of columns by which the memory grows, as in mlx_lm's caches."""


class SlotCache:
    """One layer's keys and values, with the interface of ``BatchKVCache`` for models.

    A row occupies one slot. All rows end at the same column, ``_end``, so that a decode step writes
    one column for all of them. Columns to the left of a short row are masked.

    For example, ``SlotCache([a, b], capacity=4)`` with 3 and 5 tokens allocates four slots of 256
    columns:

        column    0 1 2 3 4 5 6
        slot 0    . . a a a          length 3
        slot 1    b b b b b          length 5, _end = 5
        slots 2 and 3 are free

    1. ``update_and_fetch`` writes each row's next token to column 5, and ``_end`` becomes 6.
    2. ``add([c], ...)`` with 2 tokens writes ``c`` to columns 4 and 5 of slot 2, and zeros to its
       left.
    3. ``keep([0, 2], ...)`` removes ``b``: slot 2 is copied to slot 1, and slot 2 becomes free. The
       longest row is now ``a`` with 4 tokens, so models get columns 2 to 5.
    4. Memory is only reallocated when the slots or the columns run out, or for a row longer than
       ``_end``. Unused columns on the left are dropped then.

    Args:
        rows: The caches of the rows.
        capacity: Number of slots to allocate, if larger than the number of rows.
    """

    def __init__(self, rows: Sequence[Any], capacity: int) -> None:
        # (slots, heads, columns, head size); None before the first token.
        self._memory: Parts | None = None
        self._lengths: list[int] = []
        self._end = 0
        self._offset: mx.array | None = None
        self.add(rows, capacity)

    @property
    def offset(self) -> mx.array:
        """Number of tokens in each row, shape ``(rows,)``."""
        if self._offset is None:
            self._offset = mx.array(self._lengths, dtype=mx.int32)
        return self._offset

    @property
    def state(self) -> Parts | None:
        """The arrays to evaluate."""
        return self._memory

    @property
    def keys(self) -> mx.array | None:
        """The memory of the keys, shape (slots, heads, columns, head size).

        Settable, because models that are sharded by layers replace the array.
        """
        return self._memory[0] if self._memory else None

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        if self._memory:
            self._memory = keys, *self._memory[1:]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        return sum(part.nbytes for part in self._memory or ())

    def make_mask(self, count: int, **kwargs: Any) -> mx.array:
        """Return the mask of the columns attended to by the next ``count`` tokens of each row."""
        longest = max(self._lengths)
        padding = mx.array([longest - length for length in self._lengths], dtype=mx.int32)
        kwargs.pop("return_array", None)
        mask: mx.array = create_causal_mask(count, offset=longest, left_padding=padding, **kwargs)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append tokens to every row.

        Args:
            keys: Shape (rows, heads, tokens, head size).
            values: As ``keys``.

        Returns:
            The keys and values of all rows, padded on the left.
        """
        rows, count = len(self._lengths), keys.shape[2]
        parts = self._packed(keys, values)
        if self._memory is None:
            self._memory = _empty(parts, rows, count)
        elif self._end + count > self._memory[0].shape[2]:
            self._memory = self._reallocated(self._memory, rows, max(self._lengths), count)
        begin = self._end
        self._end += count
        _write(self._memory, slice(0, rows), slice(begin, self._end), parts)
        self._lengths = [length + count for length in self._lengths]
        self._offset = None
        return self._unpacked(self._used(self._memory))

    def keys_and_values(self) -> Any:
        """Return keys and values, padded on the left; None before the first token.

        Part of the interface of mlx_lm's caches: afm7 and gemma3n call it for layers that share
        the cache of another layer.
        """
        return self._unpacked(self._used(self._memory)) if self._memory else None

    def add(self, rows: Sequence[Any], capacity: int) -> None:
        """Copy rows into free slots.

        Args:
            rows: The caches of the rows.
            capacity: Number of slots to allocate, if memory has to be reallocated.
        """
        present = len(self._lengths)
        needed = present + len(rows)
        lengths = [*self._lengths, *(row.offset for row in rows)]
        longest = max(lengths)
        if self._memory is None:
            filled = [row for row in rows if row.offset]
            if filled:
                self._memory = _empty(parts_of(filled[0]), max(capacity, needed), longest + 1)
                self._end = longest
        elif needed > self._memory[0].shape[0] or longest > self._end:
            self._memory = self._reallocated(self._memory, max(capacity, needed), longest, 1)
        self._lengths, self._offset = lengths, None
        if self._memory is None:
            return
        for slot, row in enumerate(rows, start=present):
            # Including the columns to the left, where a previous row's values must not remain.
            parts = _padded(row, self._memory, self._end)
            _write(self._memory, slice(slot, slot + 1), slice(0, self._end), parts)

    def copies_to_move(self, slots: Sequence[int]) -> Parts | None:
        """Copy the rows :meth:`keep` will move to another slot.

        Evaluate the copies before calling :meth:`keep`: while a computation that reads the memory
        is pending, MLX writes to a copy of the whole memory instead of in place.

        Args:
            slots: The slots of the rows to keep, in their new order.
        """
        sources = [source for target, source in enumerate(slots) if target != source]
        if self._memory is None or not sources:
            return None
        index = mx.array(sources, dtype=mx.int32)
        return tuple(part[index] for part in self._memory)

    def keep(self, slots: Sequence[int], moved: Parts | None) -> None:
        """Keep the rows in ``slots`` as slots 0, 1 and so on, and remove the others.

        Args:
            slots: The slots of the rows to keep, in their new order.
            moved: The result of :meth:`copies_to_move` for these slots.
        """
        if self._memory and moved:
            targets = [target for target, source in enumerate(slots) if target != source]
            for index, slot in enumerate(targets):
                row = tuple(part[index : index + 1] for part in moved)
                _write(self._memory, slice(slot, slot + 1), slice(None), row)
        self._lengths = [self._lengths[slot] for slot in slots]
        self._offset = None

    def extract(self, slot: int) -> Any:
        """Copy a row out of the batch."""
        row = self.view(slot)
        if parts := parts_of(row):
            fill(row, tuple(map(copied, parts)), row.offset)
        return row

    def view(self, slot: int) -> Any:
        """Return a row as a view of the batch's memory, valid until the next write."""
        row = self._empty_row()
        if self._memory and self._lengths[slot]:
            columns = slice(self._end - self._lengths[slot], self._end)
            parts = tuple(part[slot : slot + 1, :, columns] for part in self._memory)
            fill(row, parts, self._lengths[slot])
        return row

    def compact(self) -> None:
        """Move the rows to the smallest memory that fits them."""
        if self._memory is None:
            return
        rows, longest = len(self._lengths), max(self._lengths)
        capacity, _, columns, _ = self._memory[0].shape
        if capacity > rows or columns > _rounded(longest + 1):
            self._memory = self._reallocated(self._memory, rows, longest, 1)

    def _used(self, memory: Parts) -> Parts:
        rows, columns = len(self._lengths), slice(self._end - max(self._lengths), self._end)
        return tuple(part[:rows, :, columns] for part in memory)

    def _packed(self, keys: mx.array, values: mx.array) -> Parts:
        """Return the arrays to hold for keys and values."""
        return keys, values

    def _unpacked(self, parts: Parts) -> Any:
        """Return keys and values as models get them."""
        return parts

    def _empty_row(self) -> Any:
        return KVCache()

    def _reallocated(self, memory: Parts, capacity: int, longest: int, more: int) -> Parts:
        """Copy the rows to ``capacity`` slots of ``longest`` columns plus room for ``more``."""
        left = longest - max(self._lengths)
        right = _rounded(longest + more) - longest
        padding = [(0, capacity - len(self._lengths)), (0, 0), (left, right), (0, 0)]
        moved = tuple(mx.pad(part, padding) for part in self._used(memory))
        self._end = longest
        return moved


class QuantizedSlotCache(SlotCache):
    """A :class:`SlotCache` whose keys and values are held quantized.

    Args:
        rows: The caches of the rows.
        capacity: Number of slots to allocate, if larger than the number of rows.
    """

    def __init__(self, rows: Sequence[QuantizedCache], capacity: int) -> None:
        # The names by which mlx_lm's attention recognizes quantized keys and values.
        self.group_size: int = rows[0].group_size
        self.bits: int = rows[0].bits
        super().__init__(rows, capacity)

    def _packed(self, keys: mx.array, values: mx.array) -> Parts:
        return quantized(keys, values, self.group_size, self.bits)

    def _unpacked(self, parts: Parts) -> tuple[Parts, Parts]:
        return split(parts)

    def _empty_row(self) -> QuantizedCache:
        return QuantizedCache(self.group_size, self.bits)


def _empty(like: Parts, capacity: int, columns: int) -> Parts:
    """Allocate memory for keys and values shaped like ``like``."""
    return tuple(
        mx.zeros((capacity, part.shape[1], _rounded(columns), part.shape[3]), part.dtype)
        for part in like
    )


def _padded(row: Any, memory: Parts, columns: int) -> Parts:
    """Return a row's keys and values, padded on the left to ``columns`` columns."""
    if not row.offset:
        return tuple(mx.zeros_like(part[:1, :, :columns]) for part in memory)
    padding = [(0, 0), (0, 0), (columns - row.offset, 0), (0, 0)]
    return tuple(mx.pad(part[:, :, : row.offset], padding) for part in parts_of(row))


def _write(memory: Parts, rows: slice, columns: slice, parts: Parts) -> None:
    """Write keys and values, in place unless a pending computation reads the memory."""
    for whole, part in zip(memory, parts, strict=True):
        whole[rows, :, columns] = part


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
