"""Keys and values of the batch stay correct while rows are added, removed and extended."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.cache.quantized import QuantizedCache  # noqa: E402
from runner_server.mlx_backend.cache.row_caches import keep  # noqa: E402
from runner_server.mlx_backend.cache.slots import QuantizedSlotCache, SlotCache  # noqa: E402
from runner_server.mlx_backend.upstream.names import KVCache  # noqa: E402

HEADS, SIZE = 2, 32

_moves = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 300), min_size=1, max_size=3)),
        st.tuples(st.just("step"), st.integers(1, 130)),
        st.tuples(st.just("leave"), st.integers(0, 10)),
    ),
    max_size=12,
)


def fresh(length: int, name: int, bits: int = 0) -> Any:
    """Make a row's cache whose values identify the row and the token."""
    row = QuantizedCache(SIZE, bits) if bits else KVCache()
    if length:
        row.update_and_fetch(*content(name, 0, length))
    return row


def content(name: int, start: int, end: int) -> tuple[Any, Any]:
    """Return keys and values of row ``name`` for a range of tokens: (1, heads, tokens, size)."""
    tokens = mx.arange(start, end, dtype=mx.float32)[None, None, :, None] + 1000 * (name + 1)
    keys = mx.broadcast_to(tokens, (1, HEADS, end - start, SIZE))
    return keys, -keys


def check(cache: SlotCache, rows: list[tuple[int, int]]) -> None:
    """Check that rows are aligned at the end and hold the expected content."""
    assert cache.offset.tolist() == [length for _, length in rows]
    if not any(length for _, length in rows):
        return
    held = cache.keys_and_values()
    assert held
    keys, values = numbers(cache, held)
    assert keys.shape == (len(rows), HEADS, max(length for _, length in rows), SIZE)
    assert mx.isfinite(keys).all()
    for slot, (name, length) in enumerate(rows):
        begin = keys.shape[2] - length
        expected, negative = content(name, 0, length)
        assert mx.array_equal(keys[slot : slot + 1, :, begin:], expected)
        assert mx.array_equal(values[slot : slot + 1, :, begin:], negative)
        mask = cache.make_mask(1)[slot, 0, 0].tolist()
        assert mask == [False] * begin + [True] * (length + 1)
        alone = cache.extract(slot)
        assert alone.offset == length
        if length:
            assert mx.array_equal(numbers(cache, alone.keys_and_values())[0], expected)


def numbers(cache: SlotCache, held: Any) -> Any:
    """Return keys and values as numbers, which are whole ones before they are quantized."""
    if not isinstance(cache, QuantizedSlotCache):
        return held
    return [mx.round(mx.dequantize(*parts, SIZE, cache.bits)) for parts in held]


@pytest.mark.parametrize("bits", [0, 8, 4])
@settings(max_examples=30, deadline=None)
@given(first=st.lists(st.integers(0, 300), min_size=2, max_size=4), moves=_moves)
def test_rows_are_added_extended_and_removed(
    bits: int, first: list[int], moves: list[tuple[str, Any]]
) -> None:
    rows = list(enumerate(first))
    names = iter(range(len(first), 100))
    new = QuantizedSlotCache if bits else SlotCache
    cache: Any = new([fresh(length, name, bits) for name, length in rows], 3)
    check(cache, rows)
    for kind, value in moves:
        if kind == "add":
            added = [(next(names), length) for length in value]
            cache.add([fresh(length, name, bits) for name, length in added], len(rows) + 5)
            rows += added
        elif kind == "step":
            for _ in range(value):
                parts = [content(name, length, length + 1) for name, length in rows]
                cache.update_and_fetch(*(mx.concatenate(side) for side in zip(*parts, strict=True)))
                rows = [(name, length + 1) for name, length in rows]
                mx.eval(cache.state)
        elif len(rows) > 2:
            gone = value % len(rows)
            slots = [*range(len(rows) - 1)]
            if gone < len(slots):
                slots[gone] = len(slots)
            rows = [rows[slot] for slot in slots]
            keep([cache], slots)
        check(cache, rows)


def test_a_row_never_sees_the_content_of_its_slots_previous_row() -> None:
    """Zero times NaN is NaN, so a broken row must not leak into the next row of the slot."""
    broken = KVCache()
    broken.update_and_fetch(*(mx.full((1, HEADS, 200, SIZE), mx.nan) for _ in range(2)))
    cache = SlotCache([fresh(100, 0), fresh(5, 1), broken], 0)
    keep([cache], [0, 1])
    cache.add([fresh(7, 2)], 0)
    check(cache, [(0, 100), (1, 5), (2, 7)])
    keep([cache], [2, 1])
    # The longest row exposes all columns again.
    cache.add([fresh(200, 3)], 0)
    check(cache, [(2, 7), (1, 5), (3, 200)])


def test_adding_and_removing_rows_copies_no_other_rows() -> None:
    cache = SlotCache([fresh(2000, name) for name in range(8)], 0)
    mx.eval(cache.state)
    mx.clear_cache()
    row = cache.extract(0).nbytes
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    keep([cache], [0, 1, 2, 7, 4, 5, 6])
    mx.eval(cache.state)
    cache.add([fresh(1000, 9)], 0)
    mx.eval(cache.state)
    # The cache has room for eight rows.
    assert mx.get_peak_memory() - before <= 3 * row
    assert mx.get_active_memory() - before <= row / 10


def test_a_step_writes_into_the_existing_buffer() -> None:
    cache = SlotCache([fresh(2000, name) for name in range(8)], 0)
    mx.eval(cache.state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        step = mx.zeros((8, HEADS, 1, SIZE))
        mx.eval(cache.update_and_fetch(step, step)[0].sum(), cache.state)
    assert mx.get_peak_memory() - before < cache.nbytes / 2


def test_the_buffer_is_allocated_for_the_given_capacity() -> None:
    cache = SlotCache([fresh(10, 0), fresh(20, 1)], 6)
    taken = cache.nbytes
    cache.add([fresh(30, name) for name in range(2, 6)], 0)
    assert cache.nbytes == taken
    cache.add([fresh(30, 6)], 0)
    assert cache.nbytes > taken
