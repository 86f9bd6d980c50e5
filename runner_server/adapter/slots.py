"""Keys and values of the rows of a batch, in memory in which rows come and go.

mlx_lm's batched cache is copied whole whenever a row comes or goes. Here a row that
comes is written into a free slot, and the last row takes the slot of one that goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from runner_server.adapter.arrays import copied
from runner_server.adapter.names import KVCache, create_causal_mask

_STEP = 256
"""Tokens that the memory grows by, as mlx_lm's caches do."""


class SlotCache:
    """One layer's keys and values, for models that ask of it what they ask of ``BatchKVCache``.

    Rows end at the same column, so that a step writes one column for all; what lies to the
    left of a short row is masked.

    Args:
        rows: The caches of the rows; more than one, or what is added later is not known.
        capacity: Rows to make room for, if that is more.

    Attributes:
        keys: (slots, heads, columns, head size); None before the first token.
        values: As ``keys``.
    """

    def __init__(self, rows: Sequence[KVCache], capacity: int) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
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
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """What there is to evaluate."""
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes taken, whether in use or not."""
        return sum(part.nbytes for part in self.state if part is not None)

    def make_mask(self, count: int, **kwargs: Any) -> mx.array:
        """Which columns each of the next ``count`` tokens of each row sees."""
        longest = max(self._lengths)
        padding = mx.array([longest - length for length in self._lengths], dtype=mx.int32)
        kwargs.pop("return_array", None)
        return create_causal_mask(count, offset=longest, left_padding=padding, **kwargs)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends to every row.

        Args:
            keys: (rows, heads, tokens, head size).
            values: As ``keys``.

        Returns:
            All keys and values, padded on the left.
        """
        count = keys.shape[2]
        if self.keys is None:
            self._allocate(keys, values, len(self._lengths), count)
        elif self._end + count > self.keys.shape[2]:
            self._reallocate(len(self._lengths), max(self._lengths), count)
        rows, begin = len(self._lengths), self._end
        self._end += count
        self._write(slice(0, rows), slice(begin, self._end), keys, values)
        self._lengths = [length + count for length in self._lengths]
        self._offset = None
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values, padded on the left."""
        rows, columns = len(self._lengths), slice(self._end - max(self._lengths), self._end)
        return self.keys[:rows, :, columns], self.values[:rows, :, columns]

    def add(self, rows: Sequence[KVCache], capacity: int) -> None:
        """Copies rows into free slots.

        Args:
            rows: Their caches.
            capacity: Rows to make room for where memory is taken anyway.
        """
        present = len(self._lengths)
        needed = present + len(rows)
        longest = max([*self._lengths, *(row.offset for row in rows)])
        filled = [row for row in rows if row.keys is not None]
        if self.keys is None:
            if filled:
                self._allocate(filled[0].keys, filled[0].values, max(capacity, needed), longest + 1)
        elif needed > self.keys.shape[0] or longest > self._end:
            self._reallocate(max(capacity, needed), longest, 1)
        self._lengths = [*self._lengths, *(row.offset for row in rows)]
        self._offset = None
        if self.keys is None:
            return
        self._end = max(self._end, longest)
        for slot, row in enumerate(rows, start=present):
            # All that lies to the left: nothing of an earlier row may be left in it.
            self._write(slice(slot, slot + 1), slice(0, self._end), *self._padded(row))

    def keep(self, places: Sequence[int]) -> None:
        """Keeps the rows of these slots, the first in the first slot and so on."""
        moves = [(slot, place) for slot, place in enumerate(places) if slot != place]
        if self.keys is not None and moves:
            sources = mx.array([place for _, place in moves], dtype=mx.int32)
            keys, values = self.keys[sources], self.values[sources]
            for index, (slot, _) in enumerate(moves):
                part = slice(index, index + 1)
                self._write(slice(slot, slot + 1), slice(None), keys[part], values[part])
        self._lengths = [self._lengths[place] for place in places]
        self._offset = None

    def extract(self, place: int) -> KVCache:
        """Copies a row."""
        row = KVCache()
        if self.keys is not None and self._lengths[place]:
            columns = slice(self._end - self._lengths[place], self._end)
            parts = (part[place : place + 1, :, columns] for part in (self.keys, self.values))
            row.state = (*(copied(part) for part in parts), self._lengths[place])
        return row

    def _allocate(self, keys: mx.array, values: mx.array, capacity: int, columns: int) -> None:
        """Takes memory for keys and values like these."""

        def like(part: mx.array) -> mx.array:
            return mx.zeros((capacity, part.shape[1], _rounded(columns), part.shape[3]), part.dtype)

        self.keys, self.values = like(keys), like(values)

    def _reallocate(self, capacity: int, longest: int, more: int) -> None:
        """Moves all rows to other memory: for so many, so long, and some tokens to come."""
        rows, held = len(self._lengths), max(self._lengths)
        padding = [
            (0, capacity - rows),
            (0, 0),
            (longest - held, _rounded(longest + more) - longest),
            (0, 0),
        ]
        self.keys, self.values = (mx.pad(part, padding) for part in self.keys_and_values())
        self._end = longest

    def _padded(self, row: KVCache) -> tuple[mx.array, mx.array]:
        """A row's keys and values up to the column where all rows end."""
        if row.keys is None:
            return mx.zeros_like(self.keys[:1, :, : self._end]), mx.zeros_like(
                self.values[:1, :, : self._end]
            )
        padding = [(0, 0), (0, 0), (self._end - row.offset, 0), (0, 0)]
        return tuple(
            mx.pad(part[:, :, : row.offset], padding) for part in (row.keys, row.values)
        )

    def _write(self, rows: slice, columns: slice, keys: mx.array, values: mx.array) -> None:
        self.keys[rows, :, columns] = keys
        self.values[rows, :, columns] = values


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
