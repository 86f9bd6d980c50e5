"""The sampler, compared with straightforward NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from runner_server.engine.types import Sampling

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.sampling.logprobs import token_logprobs  # noqa: E402
from runner_server.mlx_backend.sampling.noise import negative_gumbel  # noqa: E402
from runner_server.mlx_backend.sampling.sampler import Sampler  # noqa: E402
from runner_server.mlx_backend.sampling.selection import largest  # noqa: E402
from support.sweeps import diagonal  # noqa: E402

VOCAB = 50
LARGE = 151_936
DRAWS = 3000
ROWS = 50
OPEN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0}
SEEDS = [-(2**63), -(2**63) + 1, -(2**32), -1, 0, 1, 2**31, 2**32, 2**63 - 2, 2**63 - 1]


def _logits(seed: int = 0, vocab: int = VOCAB) -> Any:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def _peaked(seed: int, vocab: int = LARGE, likely: int = 300) -> Any:
    """Make logits of a large vocabulary with nearly the whole probability on few ids."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-20, 1, vocab).astype(np.float32)
    logits[rng.choice(vocab, likely, replace=False)] = rng.normal(0, 1.5, likely)
    return logits


def _flat(seed: int, vocab: int = LARGE) -> Any:
    """Make logits of a large vocabulary with many thousand likely ids."""
    return np.random.default_rng(seed).normal(0, 0.3, vocab).astype(np.float32)


def _half(logits: Any) -> Any:
    """Round logits to bfloat16, in which most values occur often."""
    return np.array(mx.array(logits).astype(mx.bfloat16).astype(mx.float32))


def _softmax(logits: Any) -> Any:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def _support(logits: Any, **options: Any) -> set[int]:
    """Return the tokens which may be sampled, applying the options in the protocol's order."""
    o = {**OPEN, **options}
    kept = np.argsort(-logits)
    if o["top_k"]:
        kept = kept[: o["top_k"]]
    probs = _softmax(logits[kept] / o["temperature"])
    if o["top_p"] < 1:
        before = np.cumsum(probs) - probs
        kept, probs = kept[before < o["top_p"]], probs[before < o["top_p"]]
    keep = probs >= o["min_p"] * probs.max()
    return {int(id_) for id_ in kept[keep]}


def _draw(
    logits: Sequence[Any], options: Sequence[Sampling], positions: int = 1
) -> list[tuple[int, ...]]:
    """Sample the tokens of each row at the first ``positions``."""
    rows = mx.array(np.stack(logits))
    sampler = Sampler(options, rows.shape[-1])
    steps = [np.array(sampler(rows, [at] * len(options))) for at in range(positions)]
    return [tuple(int(step[row]) for step in steps) for row in range(len(options))]


def _draws(logits: Any, count: int = DRAWS, **options: Any) -> Any:
    """Sample with many seeds, at several positions each."""
    rows = [Sampling(**{**OPEN, **options, "seed": 11 + i}) for i in range(min(count, ROWS))]
    drawn = _draw([logits] * len(rows), rows, max(1, count // ROWS))
    return np.array(drawn).flatten()


CASES: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 10, "top_p": 0.7},
    {"top_k": 10, "top_p": 0.9, "min_p": 0.15},
    {"temperature": 0.3, "top_p": 0.8},
    {"temperature": 3.0, "min_p": 0.3},
    {"temperature": 100.0, "top_k": 3},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_only_allowed_tokens_are_sampled(options: dict[str, Any], seed: int) -> None:
    logits = _logits(seed)
    expected = _support(logits, **options)
    drawn = {int(id_) for id_ in _draws(logits, 1000, **options)}
    assert drawn <= expected
    if len(expected) <= 5:
        assert drawn == expected


@pytest.mark.parametrize("top_k", [1, 2, 63, 64, 65, 256, 257, 1024, 1025, 2999, 3000])
def test_top_k_keeps_exactly_k_tokens(top_k: int) -> None:
    """The values of top_k cross the sizes of the candidate groups."""
    logits = np.random.default_rng(top_k).permutation(3000).astype(np.float32) / 1e5
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=top_k)
    rows = [replace(sampling, seed=seed) for seed in range(40)]
    drawn = set(itertools.chain(*_draw([logits] * 40, rows, 5)))
    best = np.argsort(-logits)
    assert drawn <= set(best[:top_k].tolist())
    # The probabilities are nearly equal, so the last candidates come up as well.
    assert drawn & set(best[-(-top_k // 2) - 1 : top_k].tolist())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 8, "temperature": 1.7}])
def test_samples_follow_the_softmax(options: dict[str, Any]) -> None:
    """Pearson's chi-square with fixed seeds; the bound is about the 99.99 % quantile."""
    logits = _logits(3, 12)
    support = sorted(_support(logits, **options))
    probs = _softmax(logits[support] / options.get("temperature", 1.0))
    counts = np.bincount(_draws(logits, **options), minlength=12)[support]
    assert counts.sum() == DRAWS
    chi_square = float((((counts - DRAWS * probs) ** 2) / (DRAWS * probs)).sum())
    freedom = len(support) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_samples_follow_the_softmax_across_positions_and_seeds(along: str) -> None:
    logits = _logits(3, 12)
    sampling = Sampling(**OPEN, seed=1)
    if along == "positions":
        drawn = _draw([logits], [sampling], 1000)[0]
    else:
        rows = [replace(sampling, seed=seed) for seed in range(1000)]
        drawn = tuple(ids[0] for ids in _draw([logits] * 1000, rows))
    probs = _softmax(logits)
    counts = np.bincount(drawn, minlength=12)
    chi_square = float((((counts - 1000 * probs) ** 2) / (1000 * probs)).sum())
    assert chi_square < 11 + 4 * math.sqrt(22) + 8


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-38, 1.4e-45])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature: float, options: dict[str, Any]) -> None:
    for seed in range(5):
        logits = _logits(seed) + 30
        drawn = set(_draws(logits, 10, temperature=temperature, **options).tolist())
        assert drawn == {int(logits.argmax())}


def test_top_k_of_the_whole_vocabulary_equals_no_top_k() -> None:
    logits = _logits(4)
    assert (_draws(logits, 200) == _draws(logits, 200, top_k=VOCAB)).all()
    assert (_draws(logits, 200) == _draws(logits, 200, top_k=VOCAB - 1)).mean() > 0.95


NEIGHBOURS = [
    Sampling(temperature=0),
    Sampling(seed=1, top_k=1),
    Sampling(seed=2),
    Sampling(seed=3, top_k=64, top_p=1.0),
    Sampling(seed=4, top_k=200),
    Sampling(seed=5, top_k=1000, top_p=1.0),
    Sampling(seed=6, top_k=2000),
    Sampling(seed=7, top_k=0),
    Sampling(seed=8, top_k=0, top_p=1.0),
    Sampling(seed=9, top_k=0, top_p=1.0, min_p=0.02, temperature=1.7),
    Sampling(seed=10, top_k=40, top_p=1.0, min_p=0.1),
    Sampling(seed=2),
]
"""Options for every group of candidates, with single and combined cuts."""


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab", [VOCAB, 3000])
def test_sampling_of_a_row_does_not_depend_on_its_neighbours(vocab: int, half: bool) -> None:
    logits = [_logits(seed, vocab) for seed in range(len(NEIGHBOURS))]
    if half:
        logits = [_half(row) for row in logits]
    rows = [s if s.top_k <= vocab else replace(s, top_k=vocab - 1) for s in NEIGHBOURS]
    alone = [_draw([row], [sampling], 25)[0] for row, sampling in zip(logits, rows, strict=True)]
    rng = np.random.default_rng(vocab)
    for size in (2, 3, 5, 8, 12, 12):
        order = rng.permutation(len(rows))[:size]
        together = _draw([logits[i] for i in order], [rows[i] for i in order], 25)
        assert together == [alone[i] for i in order]


def test_rows_may_be_at_different_positions() -> None:
    logits = mx.array(np.stack([_logits(1)] * 3))
    options = [Sampling(**OPEN, seed=5)] * 3
    text = _draw([_logits(1)], [options[0]], 30)[0]
    drawn = Sampler(options, VOCAB)(logits, [0, 17, 29]).tolist()
    assert drawn == [text[0], text[17], text[29]]


@pytest.mark.parametrize(("top_p", "half"), diagonal([0.5, 0.95], [False, True]))
def test_top_p_alone_is_correct_in_a_large_vocabulary(top_p: float, half: bool) -> None:
    """Some hundred candidates suffice for top_p, unless a neighbour needs the whole vocabulary."""
    peaked, flat = _peaked(1), _flat(2)
    if half:
        peaked, flat = _half(peaked), _half(flat)
    rows = [Sampling(temperature=1.0, top_k=0, top_p=top_p, seed=seed) for seed in range(3)]
    few = [_draw([peaked], [row], 8)[0] for row in rows]
    # The flat row forces a sort of the whole vocabulary for all three.
    together = _draw([peaked, flat, peaked], rows, 8)
    assert [together[0], together[2]] == [few[0], few[2]]
    assert together[1] == _draw([flat], [rows[1]], 8)[0]
    if not half:
        assert set(itertools.chain(*few)) <= _support(peaked, top_p=top_p)
        assert set(together[1]) <= _support(flat, top_p=top_p)


OTHERS = [
    Sampling(temperature=1.0, top_k=0, top_p=0.99, seed=5),
    Sampling(temperature=1.0, top_k=10_000, seed=6),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.5, seed=7),
]


@pytest.mark.parametrize("kind", [_peaked, _flat])
@pytest.mark.parametrize("other", OTHERS, ids=["top_p", "top_k", "min_p"])
def test_top_p_cuts_equally_likely_ids_consistently(kind: Any, other: Sampling) -> None:
    """In half precision many ids are equally likely, and the cut may fall between two."""
    logits = np.round(kind(3, 20_000))
    row = Sampling(temperature=1.0, top_k=0, top_p=0.7, seed=4)
    alone = _draw([logits], [row], 40)[0]
    assert _draw([logits, _flat(4, 20_000)], [row, other], 40)[0] == alone


@pytest.mark.parametrize("other", OTHERS, ids=["top_p", "top_k", "min_p"])
def test_without_top_p_every_id_may_be_sampled_beside_any_neighbour(other: Sampling) -> None:
    """Sampling is not limited to the candidates of the neighbour's ``top_p``."""
    row = Sampling(**OPEN, seed=1)
    logits = _flat(1, 20_000)
    alone = _draw([logits], [row], 40)[0]
    assert len(set(alone) - set(np.argsort(-logits)[:1024].tolist())) > 20
    assert _draw([logits, _peaked(2, 20_000)], [row, other], 40)[0] == alone


@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_top_p_alone_follows_the_softmax_in_a_large_vocabulary(top_p: float) -> None:
    logits = _peaked(5, 20_000, likely=12)
    support = sorted(_support(logits, top_p=top_p))
    assert 1 < len(support) <= 12
    probs = _softmax(logits[support])
    rows = [Sampling(temperature=1.0, top_k=0, top_p=top_p, seed=seed) for seed in range(16)]
    drawn = list(itertools.chain(*_draw([logits] * 16, rows, 25)))
    counts = np.array([drawn.count(id_) for id_ in support])
    assert counts.sum() == len(drawn)
    chi_square = float((((counts - 400 * probs) ** 2) / (400 * probs)).sum())
    freedom = len(support) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("shape", [(1, 50, 5), (3, 3000, 64), (2, 32_000, 64), (2, LARGE, 64)])
@pytest.mark.parametrize("count", [0, 20, 1024])
def test_largest_finds_the_largest_logits(shape: tuple[int, int, int], count: int) -> None:
    rows, size, default = shape
    count = min(count or default, size - 1)
    logits = np.random.default_rng(size).normal(0, 2, (rows, size)).astype(np.float32)
    ids, values = (np.array(part) for part in largest(mx.array(logits), count))
    assert ids.shape == values.shape == (rows, count)
    np.testing.assert_array_equal(np.take_along_axis(logits, ids, 1), values)
    np.testing.assert_array_equal(np.sort(values, 1), np.sort(logits, 1)[:, -count:])
    assert all(len(set(row)) == count for row in ids.tolist())


def test_largest_returns_distinct_ids_among_equal_logits() -> None:
    """Covers bfloat16 rows of a large vocabulary, also with impossible ids."""
    flat = _flat(6)
    for logits in (np.round(flat), np.where(flat > 0, -np.inf, flat), np.zeros(LARGE)):
        row = mx.array(logits.astype(np.float32))[None].astype(mx.bfloat16)
        ids, values = largest(row, 256)
        assert len(np.unique(ids)) == 256
        assert np.array(ids).max() < LARGE
        exact = np.sort(np.array(row.astype(mx.float32))[0])[-256:]
        np.testing.assert_array_equal(np.sort(np.array(values.astype(mx.float32))[0]), exact)


def test_a_banned_token_is_never_sampled() -> None:
    """A logit of minus infinity bars a token under every kind of cut."""
    logits = _logits(9)
    logits[::2] = -np.inf
    rows = [replace(s, top_k=min(s.top_k, VOCAB)) for s in NEIGHBOURS]
    for drawn in _draw([logits] * len(rows), rows, 30):
        assert all(id_ % 2 for id_ in drawn)


def test_noise_depends_on_the_id_and_not_on_its_index() -> None:
    ids = np.arange(1000)
    straight = np.array(negative_gumbel([7], [3], mx.array(ids)[None]))[0]
    order = np.random.default_rng(1).permutation(1000)
    np.testing.assert_array_equal(
        np.array(negative_gumbel([7], [3], mx.array(ids[order])[None]))[0], straight[order]
    )
    rows = np.array(negative_gumbel([1, 7, -2], [9, 3, 3], mx.array(ids)[None]))
    np.testing.assert_array_equal(rows[1], straight)
    for dtype in (mx.int32, mx.uint32, mx.int64):
        again = negative_gumbel([7], [3], mx.array(ids)[None].astype(dtype))
        np.testing.assert_array_equal(np.array(again)[0], straight)


def test_noise_has_a_gumbel_distribution() -> None:
    """The noise has the mean and variance of the distribution, and is finite."""
    noise = np.array(negative_gumbel([3], [0], mx.arange(LARGE)[None]))
    assert np.isfinite(noise).all()
    assert -noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_noise_differs_by_seed_and_by_position() -> None:
    seeds, positions = zip(*itertools.product(SEEDS, range(100)), strict=True)
    noise = np.array(negative_gumbel(seeds, positions, mx.arange(4)[None]))
    assert len({tuple(row) for row in noise.tolist()}) == len(SEEDS) * 100
    # Rows are uncorrelated.
    wide = np.array(negative_gumbel(seeds[:200:2], positions[:200:2], mx.arange(2000)[None]))
    correlation = np.corrcoef(wide) - np.eye(len(wide))
    assert np.abs(correlation).max() < 0.15


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_is_reproducible(seed: int) -> None:
    logits = _logits(8)
    row = Sampling(**OPEN, seed=seed)
    first = _draw([logits], [row], 40)[0]
    assert len(set(first)) > 5
    assert _draw([_logits(2), logits], [Sampling(), row], 40)[1] == first


def test_sampling_works_at_late_positions() -> None:
    logits = mx.array(_logits(8))[None]
    sampler = Sampler([Sampling(**OPEN, seed=2**63 - 1)], VOCAB)
    drawn = {int(np.array(sampler(logits, [2**31 - 1 - at]))[0]) for at in range(50)}
    assert len(drawn) > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_log_probabilities_are_the_log_softmax(dtype: str, top: int) -> None:
    rows = mx.array(np.stack([_logits(seed, 3000) for seed in range(3)]))
    rows = rows.astype(getattr(mx, dtype))
    chosen = [7, 0, 2999]
    found = token_logprobs(rows, mx.array(chosen), top)
    exact = np.log(np.stack([_softmax(row) for row in np.array(rows.astype(mx.float32))]))
    np.testing.assert_allclose(np.array(found.chosen), exact[range(3), chosen], atol=1e-4)
    assert found.ids.shape == found.values.shape == (3, top)
    values, ids = np.array(found.values), np.array(found.ids)
    np.testing.assert_allclose(values, -np.sort(-exact, 1)[:, :top], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(exact, ids, 1), values, atol=1e-4)
    assert (np.diff(values, axis=1) <= 0).all()


def test_no_log_probability_is_above_zero() -> None:
    """The log probability of a certain token is at most 0 despite rounding."""
    logits = mx.zeros((1, 100)).at[0, 5].add(40.0)
    found = token_logprobs(logits, mx.array([5]), 2)
    assert np.array(found.chosen).max() <= 0
    assert np.array(found.values).max() <= 0
