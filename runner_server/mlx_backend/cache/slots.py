"""Keys and values of the rows of a batch, in memory in which rows come and go.

mlx_lm's batched cache is copied whole whenever a row comes or goes. Here a row that
comes is written into a free slot, and the last row takes the slot of one that goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from runner_server.mlx_backend.arrays import copied
from runner_server.mlx_backend.upstream.names import KVCache, create_causal_mask

Pair = tuple[mx.array, mx.array]
"""Keys and values, each (rows, heads, tokens, head size)."""

_STEP = 256
"""Tokens that the memory grows by, as mlx_lm's caches do."""


class SlotCache:
    """One layer's keys and values, for models that ask of it what they ask of ``BatchKVCache``.

    Rows end at the same column, so that a step writes one column for all; what lies to the
    left of a short row is masked.

    Args:
        rows: The caches of the rows.
        capacity: Rows to make room for, if that is more.
    """

    def __init__(self, rows: Sequence[KVCache], capacity: int) -> None:
        # (slots, heads, columns, head size); None before the first token.
        self._memory: Pair | None = None
        self._lengths: list[int] = []
        self._end = 0
        self._offset: mx.array | None = None
        self.add(rows, capacity)

    @property
    def offset(self) -> mx.array:
        """(rows,) Tokens that each row holds."""
        if self._offset is None:
            self._offset = mx.array(self._lengths, dtype=mx.int32)
        return self._offset

    @property
    def state(self) -> Pair | None:
        """What there is to evaluate."""
        return self._memory

    @property
    def keys(self) -> mx.array | None:
        """All that is there; models whose layers are split among ranks put another in its place."""
        return self._memory[0] if self._memory else None

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        if self._memory:
            self._memory = keys, self._memory[1]

    @property
    def nbytes(self) -> int:
        """Bytes taken, whether in use or not."""
        return sum(part.nbytes for part in self._memory or ())

    def make_mask(self, count: int, **kwargs: Any) -> mx.array:
        """Which columns each of the next ``count`` tokens of each row sees."""
        longest = max(self._lengths)
        padding = mx.array([longest - length for length in self._lengths], dtype=mx.int32)
        kwargs.pop("return_array", None)
        mask: mx.array = create_causal_mask(count, offset=longest, left_padding=padding, **kwargs)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """Appends to every row.

        Args:
            keys: (rows, heads, tokens, head size).
            values: As ``keys``.

        Returns:
            All keys and values, padded on the left.
        """
        rows, count = len(self._lengths), keys.shape[2]
        if self._memory is None:
            self._memory = _empty((keys, values), rows, count)
        elif self._end + count > self._memory[0].shape[2]:
            self._memory = self._reallocated(self._memory, rows, max(self._lengths), count)
        begin = self._end
        self._end += count
        _write(self._memory, slice(0, rows), slice(begin, self._end), (keys, values))
        self._lengths = [length + count for length in self._lengths]
        self._offset = None
        return self._used(self._memory)

    def keys_and_values(self) -> Pair | None:
        """All keys and values, padded on the left; None before the first token."""
        return self._used(self._memory) if self._memory else None

    def add(self, rows: Sequence[KVCache], capacity: int) -> None:
        """Copies rows into free slots.

        Args:
            rows: Their caches.
            capacity: Rows to make room for where memory is taken anyway.
        """
        present = len(self._lengths)
        needed = present + len(rows)
        lengths = [*self._lengths, *(row.offset for row in rows)]
        longest = max(lengths)
        if self._memory is None:
            filled = [row for row in rows if row.offset]
            if filled:
                like = filled[0].keys, filled[0].values
                self._memory = _empty(like, max(capacity, needed), longest + 1)
                self._end = longest
        elif needed > self._memory[0].shape[0] or longest > self._end:
            self._memory = self._reallocated(self._memory, max(capacity, needed), longest, 1)
        self._lengths, self._offset = lengths, None
        if self._memory is None:
            return
        for slot, row in enumerate(rows, start=present):
            # With all that lies to its left: nothing of an earlier row may be left there.
            parts = _padded(row, self._memory, self._end)
            _write(self._memory, slice(slot, slot + 1), slice(0, self._end), parts)

    def copies_to_move(self, slots: Sequence[int]) -> Pair | None:
        """Copies the rows that :meth:`keep` puts elsewhere.

        To be evaluated before: while something is still to be computed from the memory, MLX
        does not write into it but into a copy of all of it.

        Args:
            slots: The slots of the rows that stay, in their new order.
        """
        sources = [source for target, source in enumerate(slots) if target != source]
        if self._memory is None or not sources:
            return None
        index = mx.array(sources, dtype=mx.int32)
        return self._memory[0][index], self._memory[1][index]

    def keep(self, slots: Sequence[int], moved: Pair | None) -> None:
        """Keeps the rows of these slots, the first in the first slot and so on.

        Args:
            slots: The slots of the rows that stay, in their new order.
            moved: What :meth:`copies_to_move` gave for them.
        """
        if self._memory and moved:
            keys, values = moved
            targets = [target for target, source in enumerate(slots) if target != source]
            for index, slot in enumerate(targets):
                row = keys[index : index + 1], values[index : index + 1]
                _write(self._memory, slice(slot, slot + 1), slice(None), row)
        self._lengths = [self._lengths[slot] for slot in slots]
        self._offset = None

    def extract(self, slot: int) -> KVCache:
        """Copies a row."""
        row = self.view(slot)
        if row.keys is not None:
            row.state = (copied(row.keys), copied(row.values), row.offset)
        return row

    def view(self, slot: int) -> KVCache:
        """A row in the memory of the batch: right until that is written to, and not copied."""
        row = KVCache()
        if self._memory and self._lengths[slot]:
            columns = slice(self._end - self._lengths[slot], self._end)
            keys, values = (part[slot : slot + 1, :, columns] for part in self._memory)
            row.state = (keys, values, self._lengths[slot])
        return row

    def compact(self) -> None:
        """Moves the rows to memory that is no larger than they need."""
        if self._memory is None:
            return
        rows, longest = len(self._lengths), max(self._lengths)
        capacity, _, columns, _ = self._memory[0].shape
        if capacity > rows or columns > _rounded(longest + 1):
            self._memory = self._reallocated(self._memory, rows, longest, 1)

    def _used(self, memory: Pair) -> Pair:
        rows, columns = len(self._lengths), slice(self._end - max(self._lengths), self._end)
        keys, values = memory
        return keys[:rows, :, columns], values[:rows, :, columns]

    def _reallocated(self, memory: Pair, capacity: int, longest: int, more: int) -> Pair:
        """All rows in other memory: for so many, so long, and some tokens to come."""
        left = longest - max(self._lengths)
        right = _rounded(longest + more) - longest
        padding = [(0, capacity - len(self._lengths)), (0, 0), (left, right), (0, 0)]
        keys, values = (mx.pad(part, padding) for part in self._used(memory))
        self._end = longest
        return keys, values


def _empty(like: Pair, capacity: int, columns: int) -> Pair:
    """Memory for keys and values like these."""
    keys, values = (
        mx.zeros((capacity, part.shape[1], _rounded(columns), part.shape[3]), part.dtype)
        for part in like
    )
    return keys, values


def _padded(row: KVCache, memory: Pair, columns: int) -> Pair:
    """A row's keys and values, padded on the left to so many columns."""
    if not row.offset:
        keys, values = (mx.zeros_like(part[:1, :, :columns]) for part in memory)
        return keys, values
    padding = [(0, 0), (0, 0), (columns - row.offset, 0), (0, 0)]
    keys, values = (mx.pad(part[:, :, : row.offset], padding) for part in (row.keys, row.values))
    return keys, values


def _write(memory: Pair, rows: slice, columns: slice, parts: Pair) -> None:
    """Writes in place: the arrays of ``memory`` are others then, in the same memory."""
    for whole, part in zip(memory, parts, strict=True):
        whole[rows, :, columns] = part


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
