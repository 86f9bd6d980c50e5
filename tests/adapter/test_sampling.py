"""What the sampler does with logits, against straightforward NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from runner_server.messages import Sampling

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.adapter.sampling import draw, position_key, processors  # noqa: E402

VOCAB = 50
DRAWS = 3000
ROWS = 50
OPEN = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0}


def _logits(seed: int = 0, vocab: int = VOCAB) -> Any:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def _softmax(logits: Any) -> Any:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _support(logits: Any, **options: Any) -> set[int]:
    """The tokens that may be drawn, as the protocol orders the options."""
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


def _draws(logits: Any, count: int = DRAWS, **options: Any) -> Any:
    """Draws with many keys, some rows with each."""
    sampling = Sampling(**{**OPEN, **options})
    rows = mx.array(np.tile(logits, (min(count, ROWS), 1)))
    keys = [position_key(11, i) for i in range(max(1, count // ROWS))]
    return np.array(mx.concatenate([draw(rows, sampling, key) for key in keys]))


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
def test_only_the_support_is_drawn(options: dict[str, Any], seed: int) -> None:
    logits = _logits(seed)
    expected = _support(logits, **options)
    drawn = {int(id_) for id_ in _draws(logits, 1000, **options)}
    assert drawn <= expected
    if len(expected) <= 5:
        assert drawn == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 8, "temperature": 1.7}])
def test_draws_follow_the_softmax(options: dict[str, Any]) -> None:
    """Pearson's chi-square with a fixed seed; the bound is its 99.99 % quantile, about."""
    logits = _logits(3, 12)
    support = sorted(_support(logits, **options))
    probs = _softmax(logits[support] / options.get("temperature", 1.0))
    counts = np.bincount(_draws(logits, **options), minlength=12)[support]
    assert counts.sum() == DRAWS
    chi_square = float((((counts - DRAWS * probs) ** 2) / (DRAWS * probs)).sum())
    freedom = len(support) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-38, 1.4e-45])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature: float, options: dict[str, Any]) -> None:
    for seed in range(5):
        logits = _logits(seed) + 30
        drawn = set(_draws(logits, 10, temperature=temperature, **options).tolist())
        assert drawn == {int(logits.argmax())}


def test_top_p_of_everything_and_no_top_p_draw_the_same() -> None:
    logits = _logits(4)
    assert (_draws(logits, 200) == _draws(logits, 200, top_k=VOCAB)).all()
    assert (_draws(logits, 200) == _draws(logits, 200, top_k=VOCAB - 1)).mean() > 0.95


def test_keys_differ_by_seed_and_by_position() -> None:
    keys = {
        tuple(np.array(position_key(seed, position)))
        for seed in (-(2**63), -1, 0, 1, 2**63 - 1)
        for position in range(200)
    }
    assert len(keys) == 1000


def _reference(logits: Any, tokens: list[int], s: Sampling) -> Any:
    """Bias and penalties as the protocol states them."""
    out = logits.astype(np.float64).copy()
    for id_, value in s.logit_bias:
        out[id_] += value
    window = tokens if s.repeat_last_n < 0 else tokens[-s.repeat_last_n :]
    if s.repeat_last_n == 0:
        window = []
    for id_ in set(window):
        out[id_] = out[id_] / s.repeat_penalty if out[id_] > 0 else out[id_] * s.repeat_penalty
        out[id_] -= s.presence_penalty + window.count(id_) * s.frequency_penalty
    return out


PENALTIES = [
    Sampling(repeat_penalty=1.3),
    Sampling(repeat_penalty=0.5),
    Sampling(presence_penalty=2.0),
    Sampling(frequency_penalty=0.25),
    Sampling(frequency_penalty=-1.5, presence_penalty=-3.0),
    Sampling(repeat_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5),
    Sampling(repeat_penalty=2.0, repeat_last_n=3),
    Sampling(repeat_penalty=2.0, repeat_last_n=0),
    Sampling(frequency_penalty=0.1, repeat_last_n=-1),
    Sampling(frequency_penalty=0.1, repeat_last_n=2**31 - 1),
    Sampling(logit_bias=((3, -100.0), (7, 5.0))),
    Sampling(logit_bias=((3, 4.0),), repeat_penalty=1.5, frequency_penalty=0.3),
]


@pytest.mark.parametrize("sampling", PENALTIES, ids=range(len(PENALTIES)))
@pytest.mark.parametrize("length", [1, 2, 40, 700])
def test_bias_and_penalties(sampling: Sampling, length: int) -> None:
    logits = _logits(5)
    tokens = np.random.default_rng(6).integers(0, 9, length).tolist()
    values = mx.array(logits)[None]
    for step in processors(sampling):
        values = step(mx.array(tokens), values)
    np.testing.assert_allclose(
        np.array(values)[0], _reference(logits, tokens, sampling), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_token_seen_often_is_counted_in_half_precision_too(dtype: str) -> None:
    """bfloat16 cannot count past 256."""
    logits = mx.zeros((1, VOCAB), dtype=getattr(mx, dtype))
    tokens = mx.array([4] * 1000)
    (step,) = processors(Sampling(frequency_penalty=0.01, repeat_last_n=-1))
    assert float(step(tokens, logits)[0, 4]) == pytest.approx(-10.0, rel=0.02)


def test_no_options_change_nothing() -> None:
    assert processors(Sampling()) == []
    assert processors(Sampling(repeat_penalty=2.0, repeat_last_n=0)) == []
