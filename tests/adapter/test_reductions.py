"""Reductions over the vocabulary, against those of MLX."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

import mlx.core as mx

from runner_server.mlx_backend.sampling.reductions import argmax, total

SIZES = (1, 5, 4_096, 16_384, 32_001, 151_936)
"""The reductions fold from 16,384; 32,001 leaves a rest in both of them, and 151,936 in one."""

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_largest_is_found(size: int, dtype: str) -> None:
    logits = mx.random.normal((3, size)).astype(getattr(mx, dtype))
    assert argmax(logits).tolist() == mx.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_equals_is_found(size: int) -> None:
    firsts = sorted({0, size // 3, size // 2, max(0, size - 2), size - 1})
    logits = mx.where(mx.arange(size) >= mx.array(firsts)[:, None], 2.0, -mx.inf)
    assert argmax(logits).tolist() == firsts
    few = mx.random.randint(0, 3, (4, size)).astype(mx.float32)
    assert argmax(few).tolist() == mx.argmax(few, axis=-1).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_a_row_without_a_number_gives_an_id(size: int) -> None:
    logits = mx.array([[mx.nan], [-mx.inf], [mx.inf]]) * mx.ones((3, size))
    assert mx.all(argmax(logits) < size).item()


@pytest.mark.parametrize("size", SIZES)
def test_sums_count_every_number_once(size: int) -> None:
    logits = mx.where(mx.random.uniform(shape=(3, size)) < 0.5, 1.0, 2.0)
    assert total(logits).tolist() == mx.sum(logits, axis=-1).tolist()


@pytest.mark.parametrize("bad", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_shows_what_is_not_finite(size: int, bad: float) -> None:
    for index in {0, size // 2, size - 1}:
        logits = mx.where(mx.arange(size) == index, bad, 1.0)[None]
        assert total(logits).tolist() == pytest.approx([bad], nan_ok=True)
