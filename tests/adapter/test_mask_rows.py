"""Rows of numbers that exclude tokens, and those that are kept from step to step."""

from __future__ import annotations

import random
from collections.abc import Sequence

import mlx.core as mx
import pytest

from runner_server.mlx_backend.sampling.mask_rows import (
    MaskRows,
    expanded,
    kept_bytes,
    mask_words,
)

SIZE = 100
KEPT = kept_bytes(SIZE) // (4 * SIZE)


def masks(count: int, size: int = SIZE, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)  # noqa: S311 - reproducible
    return [rng.randbytes(4 * mask_words(size)) for _ in range(count)]


def numbers(given: Sequence[bytes], size: int = SIZE) -> list[list[float]]:
    """Return what masks add to logits, bit by bit."""
    return [
        [0.0 if mask[id_ // 8] >> id_ % 8 & 1 else float("-inf") for id_ in range(size)]
        for mask in given
    ]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_a_row_excludes_exactly_the_zeros_of_its_mask(dtype: mx.Dtype, size: int) -> None:
    given = masks(3, size, seed=size)
    for found in (expanded(given, size, dtype), MaskRows(size)(given, dtype)):
        assert found.dtype == dtype
        assert found.tolist() == numbers(given, size)


def test_rows_are_right_while_others_take_their_slots() -> None:
    rows, known, rng = MaskRows(SIZE), masks(2 * KEPT), random.Random(1)  # noqa: S311
    for step in range(300):
        # Few at a time, then as many as there are slots: some are kept, others come back.
        count = rng.choice([1, 2, 8, KEPT - 1, KEPT])
        begin = rng.randrange(len(known) - count + 1)
        given = rng.sample(known[begin : begin + count], count)
        given.append(given[step % count])
        assert rows(given, mx.float32).tolist() == numbers(given)


def test_more_masks_than_slots_are_computed_anew() -> None:
    rows, given = MaskRows(SIZE), masks(KEPT + 1)
    assert rows(given, mx.float32).tolist() == numbers(given)
    assert rows(given[:3], mx.float32).tolist() == numbers(given[:3])


def test_a_mask_used_in_each_step_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, (often, *others) = MaskRows(SIZE), masks(3 * KEPT)
    computed: list[bytes] = []
    module = "runner_server.mlx_backend.sampling.mask_rows.expanded"

    def counted(given: Sequence[bytes], size: int, dtype: mx.Dtype) -> mx.array:
        computed.extend(given)
        return expanded(given, size, dtype)

    monkeypatch.setattr(module, counted)
    for other in others:
        rows([often, other, often], mx.float32)
    assert computed == [often, *others]


def test_rows_of_another_type_take_the_place_of_those_before() -> None:
    rows, given = MaskRows(SIZE), masks(2)
    for dtype in (mx.float32, mx.bfloat16, mx.float32):
        found = rows(given, dtype)
        assert found.dtype == dtype
        assert found.tolist() == numbers(given)


def test_kept_rows_take_as_much_memory_as_is_planned_until_they_are_cleared() -> None:
    size = 10_000
    rows = MaskRows(size)
    mx.eval(rows(masks(1, size), mx.float32))
    mx.clear_cache()
    before = mx.get_active_memory()
    for mask in masks(2 * KEPT, size):
        mx.eval(rows([mask], mx.float32))
    more = mx.get_active_memory() - before
    assert 0.8 * kept_bytes(size) < more <= kept_bytes(size)
    rows.clear()
    assert mx.get_active_memory() < before


def test_a_new_row_is_written_without_a_copy_of_the_others() -> None:
    size = 10_000
    rows = MaskRows(size)
    mx.eval(rows(masks(KEPT, size), mx.float32))
    for mask in masks(3, size, seed=1):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(rows([mask], mx.float32))
        assert mx.get_peak_memory() - before < kept_bytes(size) // 4
