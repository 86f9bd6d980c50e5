"""Logit bias and penalties, compared with a reference written after the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.engine.types import Sampling

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.sampling.penalties import Penalties  # noqa: E402

VOCAB = 50


def _logits(rows: int, seed: int = 5) -> Any:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def _reference(logits: Any, tokens: Sequence[int], s: Sampling, drawn: int = 1) -> Any:
    """Compute bias and penalties as the protocol states, or as the gateway's path does."""
    out = logits.astype(np.float64).copy()
    for id_, value in s.logit_bias:
        out[id_] += value
    window = list(tokens if s.repeat_last_n < 0 else tokens[-s.repeat_last_n :])
    if s.repeat_last_n == 0:
        window = []
    for id_ in set(window):
        out[id_] = out[id_] / s.repeat_penalty if out[id_] > 0 else out[id_] * s.repeat_penalty
    if s.counts_output_only:
        window = list(tokens[len(tokens) - drawn :])
    for id_ in set(window):
        out[id_] -= s.presence_penalty + window.count(id_) * s.frequency_penalty
    return out


def _penalized(
    logits: Any,
    texts: Sequence[Sequence[int]],
    rows: Sequence[Sampling],
    drawn: Sequence[int] | None = None,
) -> Any:
    """Apply bias and penalties to the logits of rows with these token histories."""
    newest = mx.array([text[-1] for text in texts], dtype=mx.int32)
    counts = drawn or [1] * len(rows)
    out = Penalties(rows)(mx.array(logits), [text[:-1] for text in texts], newest, counts)
    return np.array(out.astype(mx.float32))


def _assert_matches_reference(
    texts: Sequence[Sequence[int]],
    rows: Sequence[Sampling],
    drawn: Sequence[int] | None = None,
) -> None:
    logits = _logits(len(rows))
    counts = drawn or [1] * len(rows)
    expected = [_reference(*parts) for parts in zip(logits, texts, rows, counts, strict=True)]
    changed = _penalized(logits, texts, rows, drawn)
    np.testing.assert_allclose(changed, expected, rtol=1e-5, atol=1e-4)


PENALTIES = [
    Sampling(repeat_penalty=1.3),
    Sampling(repeat_penalty=0.5),
    Sampling(presence_penalty=2.0),
    Sampling(frequency_penalty=0.25),
    Sampling(frequency_penalty=-1.5, presence_penalty=-3.0),
    Sampling(repeat_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5),
    Sampling(repeat_penalty=2.0, repeat_last_n=1),
    Sampling(repeat_penalty=2.0, repeat_last_n=2),
    Sampling(repeat_penalty=2.0, repeat_last_n=3),
    Sampling(repeat_penalty=2.0, repeat_last_n=0),
    Sampling(frequency_penalty=0.1, repeat_last_n=-1),
    Sampling(frequency_penalty=0.1, repeat_last_n=2**31 - 1),
    Sampling(logit_bias=((3, -100.0), (7, 5.0))),
    Sampling(logit_bias=((3, 4.0),), repeat_penalty=1.5, frequency_penalty=0.3),
    Sampling(),
]


def _text(length: int, seed: int = 6) -> list[int]:
    return [int(id_) for id_ in np.random.default_rng(seed).integers(0, 9, length)]


@pytest.mark.parametrize("sampling", PENALTIES, ids=range(len(PENALTIES)))
@pytest.mark.parametrize("length", [1, 2, 40, 64, 65, 700])
def test_bias_and_penalties_match_the_reference(sampling: Sampling, length: int) -> None:
    _assert_matches_reference([_text(length)], [sampling])


@pytest.mark.parametrize("lengths", [[1, 700], [64, 1, 65, 2], [3] * 4])
def test_rows_with_different_penalties_match_the_reference_together(lengths: list[int]) -> None:
    """Rows have windows of different sizes or none, and are padded to the widest."""
    rows = [*PENALTIES, *reversed(PENALTIES)]
    texts = [_text(lengths[i % len(lengths)], seed=i) for i in range(len(rows))]
    _assert_matches_reference(texts, rows)


@pytest.mark.parametrize(
    ("history", "newest"),
    [([1, 2, 3], 9), ([1, 2, 3], 2), ([4, 4, 4], 4), ([4, 4, 5], 4), ([5], 5), ([], 5), ([0], 1)],
    ids=str,
)
@pytest.mark.parametrize("window", [-1, 0, 1, 2, 3, 4, 64])
def test_the_newest_token_counts(history: list[int], newest: int, window: int) -> None:
    """The newest token is known only on the device, and may occur in the window before."""
    each = Sampling(repeat_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.4)
    row = replace(each, repeat_last_n=window)
    wide = Sampling(frequency_penalty=0.2, repeat_last_n=-1)
    _assert_matches_reference([[*history, newest]], [row])
    # A row with more known ids makes the others padded.
    _assert_matches_reference([[*history, newest], list(range(40))], [row, wide])
    _assert_matches_reference([list(range(40)), [*history, newest], [7]], [wide, row, row])


TEXTS = st.lists(st.integers(0, 5), min_size=1, max_size=12)
OPTIONS = st.builds(
    Sampling,
    repeat_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.25, 2.0]),
    repeat_last_n=st.integers(-1, 13),
    logit_bias=st.sampled_from([(), ((0, 2.0), (49, -100.0)), ((3, -1.0),)]),
    counts_output_only=st.booleans(),
)


@given(rows=st.lists(st.tuples(TEXTS, OPTIONS, st.integers(0, 12)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_rows_match_the_reference_together(rows: list[tuple[list[int], Sampling, int]]) -> None:
    texts, options, drawn = zip(*rows, strict=True)
    counts = [min(count, len(text)) for count, text in zip(drawn, texts, strict=True)]
    _assert_matches_reference(texts, options, counts)


@pytest.mark.parametrize("drawn", [0, 1, 2, 100, 199])
def test_output_only_penalties_count_generated_tokens_only(drawn: int) -> None:
    """The count extends beyond the 64 tokens of the repeat penalty, which includes the prompt."""
    each = Sampling(presence_penalty=0.7, frequency_penalty=0.4, counts_output_only=True)
    rows = [each, replace(each, repeat_penalty=1.5), replace(each, repeat_last_n=0)]
    rows += [replace(each, counts_output_only=False), Sampling()]
    _assert_matches_reference([_text(200)] * 5, rows, [drawn] * 5)
    for row in rows:
        _assert_matches_reference([_text(200)], [row], [drawn])


def test_output_only_penalties_have_no_effect_before_the_first_generated_token() -> None:
    row = Sampling(presence_penalty=2.0, frequency_penalty=1.0, counts_output_only=True)
    logits = _logits(1)
    np.testing.assert_array_equal(_penalized(logits, [[1, 2, 2]], [row], [0]), logits)


def test_the_newest_token_may_be_unevaluated() -> None:
    """The next step begins before the token of the current one is read."""
    newest = mx.argmax(mx.array([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]]), axis=-1)
    rows = [Sampling(frequency_penalty=1.0), Sampling(frequency_penalty=1.0)]
    out = Penalties(rows)(mx.zeros((2, 3)), [[1, 1, 2], [1]], newest.astype(mx.int32), [1, 1])
    assert out.tolist() == [[0.0, -3.0, -1.0], [-1.0, -1.0, 0.0]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frequent_tokens_are_counted_correctly_in_half_precision(dtype: str) -> None:
    """bfloat16 cannot count past 256."""
    logits = mx.zeros((1, VOCAB), dtype=getattr(mx, dtype))
    row = Sampling(frequency_penalty=0.01, repeat_last_n=-1)
    assert _penalized(logits, [[4] * 1000], [row])[0, 4] == pytest.approx(-10.0, rel=0.001)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("other", [Sampling(repeat_penalty=1.7), Sampling(logit_bias=((3, 1.5),))])
def test_a_row_without_options_keeps_its_logits(dtype: str, other: Sampling) -> None:
    logits = mx.array(_logits(3)).astype(getattr(mx, dtype))
    exact = np.array(logits.astype(mx.float32))
    plain = Sampling(repeat_last_n=0, repeat_penalty=3.0)
    changed = _penalized(logits, [[3, 3]] * 3, [Sampling(), other, plain])
    np.testing.assert_array_equal(changed[0], exact[0])
    np.testing.assert_array_equal(changed[2], exact[2])
    assert (changed[1] != exact[1]).sum() == 1


def test_without_options_the_same_logits_are_returned() -> None:
    """The dtype stays too, as a cast would cost a pass over the vocabulary."""
    logits = mx.zeros((2, VOCAB), dtype=mx.bfloat16)
    plain = [Sampling(), Sampling(repeat_penalty=2.0, repeat_last_n=0)]
    assert Penalties(plain)(logits, [[1], [2, 3]], mx.array([0, 0]), [1, 1]) is logits


def test_the_input_logits_are_not_modified() -> None:
    """Log probabilities are taken before bias and penalties."""
    before = _logits(2)
    logits = mx.array(before)
    rows = [Sampling(repeat_penalty=2.0), Sampling(logit_bias=((0, 9.0),), repeat_penalty=2.0)]
    changed = Penalties(rows)(logits, [[1, 2], [3]], mx.array([4, 5]), [1, 1])
    mx.eval(changed)
    np.testing.assert_array_equal(np.array(logits), before)
    one = mx.array(before)
    mx.eval(Penalties([rows[0], Sampling()])(one, [[1, 2], [3]], mx.array([4, 5]), [1, 1]))
    np.testing.assert_array_equal(np.array(one), before)


def test_the_bias_is_applied_before_the_penalty() -> None:
    """The bias comes first, so a penalty divides a logit made positive by the bias."""
    row = Sampling(logit_bias=((2, 5.0),), repeat_penalty=2.0)
    out = _penalized(np.full((1, VOCAB), -1.0, np.float32), [[2]], [row])
    assert out[0, 2] == pytest.approx(2.0)


def test_a_bias_may_cover_every_id_of_every_row() -> None:
    rows = [Sampling(logit_bias=tuple((i, float(i - n)) for i in range(VOCAB))) for n in range(8)]
    logits = _logits(8)
    expected = logits + np.arange(VOCAB)[None] - np.arange(8)[:, None]
    np.testing.assert_allclose(_penalized(logits, [[1]] * 8, rows), expected, rtol=1e-5)
