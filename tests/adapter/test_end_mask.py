"""The mask of end tokens changes the logits of its rows, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runner_server.engine.types import Sampling

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.sampling.end_mask import EndMask  # noqa: E402

ROWS = [
    Sampling(min_predict=2, end_ids=(0, 3)),
    Sampling(),
    Sampling(min_predict=4, end_ids=(1,)),
]


def masked(mask: EndMask, logits: Any, drawn: list[int]) -> list[set[int]]:
    """Return the ids masked in each row; check that the other logits are unchanged."""
    changed = np.array(mask(logits, drawn).astype(mx.float32))
    before = np.array(logits.astype(mx.float32))
    assert np.isfinite(before).all()
    barred = np.isneginf(changed)
    assert (changed == before)[~barred].all()
    return [set(np.flatnonzero(row).tolist()) for row in barred]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_only_the_end_tokens_of_rows_below_their_minimum_are_masked(dtype: str) -> None:
    logits = mx.random.normal((3, 5)).astype(getattr(mx, dtype))
    mask = EndMask(ROWS)
    assert mask(logits, [0, 0, 0]).dtype == logits.dtype
    assert masked(mask, logits, [0, 0, 0]) == [{0, 3}, set(), {1}]
    assert masked(mask, logits, [1, 9, 1]) == [{0, 3}, set(), {1}]
    assert masked(mask, logits, [2, 9, 2]) == [set(), set(), {1}]
    assert masked(mask, logits, [5, 9, 3]) == [set(), set(), {1}]
    assert masked(mask, logits, [6, 9, 4]) == [set(), set(), set()]


def test_without_rows_to_mask_the_logits_are_passed_on() -> None:
    logits = mx.zeros((3, 5))
    assert EndMask(ROWS)(logits, [2, 0, 4]) is logits
    assert EndMask([Sampling()] * 3)(logits, [0, 0, 0]) is logits


def test_a_row_may_join_beyond_its_minimum() -> None:
    """A preempted row resumes with the tokens it has drawn."""
    mask = EndMask(ROWS)
    assert masked(mask, mx.zeros((3, 5)), [3, 0, 3]) == [set(), set(), {1}]
