"""Tokens of constrained rows, drawn from few logits or from all of them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

import mlx.core as mx

from runner_server.engine.types import Sampling
from runner_server.mlx_backend.sampling import constrained as module
from runner_server.mlx_backend.sampling.constrained import FEW, ConstrainedSampler, few_ids
from runner_server.mlx_backend.sampling.mask_rows import MaskRows, mask_words
from support.rows import GREEDY

SIZE = 300
STEPS = 12
SAMPLINGS = (
    GREEDY,
    Sampling(seed=1),
    Sampling(seed=2, top_k=0, top_p=1.0),
    Sampling(seed=3, top_k=0, top_p=0.7),
    Sampling(seed=4, top_k=100, min_p=0.05),
    Sampling(seed=5, top_k=2, temperature=2.0),
)
COUNTS = (1, 2, 3, FEW - 1, FEW, FEW + 1, 200, SIZE, None)
"""Tokens that the constraint of a row allows; None for a row without a constraint."""


def mask_of(ids: Sequence[int]) -> array[int]:
    mask = array("I", bytes(4 * mask_words(SIZE)))
    for id_ in ids:
        mask[id_ // 32] |= 1 << id_ % 32
    return mask


def matcher(ids: Sequence[int] | None) -> Any:
    return None if ids is None else SimpleNamespace(inner=None, mask=mask_of(ids), also=None)


@pytest.fixture
def allowed() -> list[list[int] | None]:
    """The tokens that each row may draw, for rows with every sampling."""
    rng = random.Random(0)  # noqa: S311 - reproducible
    counts = [count for count in COUNTS for _ in SAMPLINGS]
    return [None if count is None else sorted(rng.sample(range(SIZE), count)) for count in counts]


def drawn(
    allowed: Sequence[Sequence[int] | None], options: Sequence[Sampling], logits: mx.array
) -> list[list[int]]:
    matchers = [matcher(ids) for ids in allowed]
    sampler = ConstrainedSampler(options, matchers, SIZE, MaskRows(SIZE))
    return [
        cast("list[int]", sampler(logits, [step] * len(matchers)).tolist()) for step in range(STEPS)
    ]


def test_few_tokens_are_drawn_like_many(
    allowed: list[list[int] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = 3 * mx.random.normal((len(allowed), SIZE), key=mx.random.key(1))
    options = SAMPLINGS * len(COUNTS)
    from_all = drawn(allowed, options, logits)
    monkeypatch.setattr(module, "_LARGE_VOCABULARY", SIZE)
    from_few = drawn(allowed, options, logits)
    assert from_few == from_all
    for row, ids in enumerate(allowed):
        assert {tokens[row] for tokens in from_few} <= set(range(SIZE) if ids is None else ids)
        alone = drawn([ids], [options[row]], logits[row : row + 1])
        assert [tokens[row] for tokens in from_few] == [tokens[0] for tokens in alone]


@pytest.mark.parametrize("large", [SIZE, SIZE + 1])
def test_the_first_of_equals_is_drawn(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE_VOCABULARY", large)
    allowed = [[7, 50, 299], [299], [3, 4]]
    assert drawn(allowed, [GREEDY] * 3, mx.zeros((3, SIZE)))[0] == [7, 299, 3]


def test_a_row_without_a_token_gets_one_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a token that the matcher refuses, not an index beyond the logits."""
    monkeypatch.setattr(module, "_LARGE_VOCABULARY", SIZE)
    tokens = drawn([[], [5]], [GREEDY, Sampling(seed=1)], mx.zeros((2, SIZE)))
    assert all(0 <= row[0] < SIZE and row[1] == 5 for row in tokens)


@pytest.mark.parametrize("count", [0, 1, 8, FEW, FEW + 1, SIZE])
def test_few_ids_are_those_of_the_mask(count: int) -> None:
    ids = sorted(random.Random(count).sample(range(SIZE), count))  # noqa: S311 - reproducible
    assert few_ids(mask_of(ids).tobytes()) == (ids if count <= FEW else None)
