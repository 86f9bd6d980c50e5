"""Rows in a batch get the tokens they would get alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rows import GREEDY, Row, alone, run_rows
from runner_server.backend import LoadedModel
from runner_server.messages import Dtype, Sampling, Token

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

ROOT = Path(__file__).parents[2]
PROMPTS = [
    "def main(",
    "class Stream:\n    def __init__(self",
    "import ",
    "for i in range(10):\n",
    "# A comment about",
    "x",
    "return self._value\n\n    def value(self):\n        " * 4,
    "try:\n    import json\nexcept ImportError:\n" * 12,
]
MIXED = [
    GREEDY,
    replace(GREEDY, repeat_penalty=1.3),
    replace(GREEDY, frequency_penalty=0.4, repeat_last_n=-1),
    replace(GREEDY, logit_bias=((5, 3.0), (9, -100.0))),
    Sampling(seed=3),
    Sampling(seed=4, top_k=0, top_p=0.95, temperature=1.1),
    replace(GREEDY, logprobs=3),
    Sampling(seed=5, min_p=0.1, presence_penalty=0.6, logprobs=1),
]


def _rows(model: LoadedModel, samplings: list[Sampling], count: int) -> list[Row]:
    prompts = [model.codec.encode(text, as_prompt=True) for text in PROMPTS]
    return [Row(p, count + i, s) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))]


_KNOWN: dict[str, list[int]] = {}


def _alone(model: LoadedModel, rows: list[Row]) -> list[list[int]]:
    """What each row gets in a batch of its own; computed once."""
    for row in rows:
        key = repr((row.prompt, row.count, row.sampling))
        if key not in _KNOWN:
            _KNOWN[key] = alone(model, row)
    return [_KNOWN[repr((row.prompt, row.count, row.sampling))] for row in rows]


def _together(model: LoadedModel, rows: list[Row]) -> list[list[int]]:
    batch = model.new_batch()
    try:
        return run_rows(batch, rows)
    finally:
        batch.close()


@pytest.mark.parametrize("spacing", [0, 1, 3])
@pytest.mark.parametrize("samplings", [[GREEDY] * 8, MIXED], ids=["greedy", "mixed"])
def test_batched_is_alone(trained: LoadedModel, samplings: list[Sampling], spacing: int) -> None:
    rows = _rows(trained, samplings, 24)
    for i, row in enumerate(rows):
        row.late = i * spacing
    assert _together(trained, rows) == _alone(trained, rows)


def test_a_row_that_arrives_at_each_step(trained: LoadedModel) -> None:
    long = trained.codec.encode(PROMPTS[0], as_prompt=True)
    other = trained.codec.encode(PROMPTS[7], as_prompt=True)
    expected = [alone(trained, Row(long, 30)), alone(trained, Row(other, 5))]
    for late in range(0, 12, 2):
        rows = [Row(long, 30), Row(other, 5, late=late)]
        assert _together(trained, rows) == expected


def test_removing_rows_leaves_the_others_alone(trained: LoadedModel) -> None:
    draw = random.Random(2)  # noqa: S311 - chooses rows
    keep = Row(trained.codec.encode(PROMPTS[1], as_prompt=True), 40)
    expected = alone(trained, keep)
    batch = trained.new_batch()
    batch.add(0, keep.prompt, keep.sampling)
    ids: list[int] = []
    live: set[int] = set()
    for step in range(200):
        if len(live) < 5:
            prompt = trained.codec.encode(draw.choice(PROMPTS), as_prompt=True)
            batch.add(step + 1, prompt, draw.choice(MIXED))
            live.add(step + 1)
        events = [event for event in batch.step() if isinstance(event, Token)]
        ids += [event.token_id for event in events if event.row == 0]
        gone = {row for row in live if draw.random() < 0.3}
        batch.remove(gone)
        live -= gone
        if len(ids) >= 40:
            break
    batch.close()
    assert ids[:40] == expected


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gemma3"])
def test_batched_logits_are_those_alone(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path], shape: str
) -> None:
    """Random weights make near-ties, so likelihoods are compared, up to the first difference."""
    model = load(model_dir(shape), parallel=8)
    draw = random.Random(5)  # noqa: S311 - prompts
    prompts = [[draw.randrange(500) for _ in range(n)] for n in (1, 2, 30, 33, 64, 150, 5, 90)]
    sampling = replace(GREEDY, logprobs=20)
    rows = [Row(prompt, 12, sampling, late=i) for i, prompt in enumerate(prompts)]
    _together(model, rows)
    for row in rows:
        single = Row(row.prompt, 12, sampling)
        _together(model, [single])
        for a, b in zip(row.logprobs, single.logprobs, strict=True):
            values, others = dict(a.top), dict(b.top)
            common = set(values) & set(others)
            assert len(common) >= 15
            for id_ in common:
                assert values[id_] == pytest.approx(others[id_], abs=2e-3)
            if a.token_id != b.token_id:
                break


def test_same_seed_same_text(tiny: LoadedModel) -> None:
    prompt = tiny.codec.encode("seeded", as_prompt=True)
    row = Row(prompt, 25, Sampling(seed=-9, temperature=1.5, top_p=1.0, top_k=0))
    first = alone(tiny, row)
    assert alone(tiny, row) == first
    assert alone(tiny, replace(row, sampling=replace(row.sampling, seed=9))) != first


_CHILD = """
import sys
from rows import Row, alone
from runner_server.adapter import MlxBackend
from runner_server.messages import LoadSpec, Sampling
backend = MlxBackend()
backend.open()
model = backend.load(LoadSpec(sys.argv[1], parallel=2), lambda _: None)
prompt = model.codec.encode("def main(", as_prompt=True)
print(alone(model, Row(prompt, 20, Sampling(seed=21))))
backend.close()
"""


def test_same_seed_same_text_in_another_process_and_in_a_batch(trained: LoadedModel) -> None:
    sampling = Sampling(seed=21)
    rows = _rows(trained, [sampling, *MIXED[1:]], 20)
    together = _together(trained, rows)[0]
    path = ":".join(str(ROOT / part) for part in ("proto", "tests", "."))
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, trained.info.path],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert child.stdout.strip() == str(together)


def test_temperature_zero_is_mlx_lms_own_greedy(trained: LoadedModel) -> None:
    from mlx_lm.generate import generate_step

    model: Any = trained
    prompt = trained.codec.encode(PROMPTS[3], as_prompt=True)
    steps = generate_step(mx.array(prompt), model._model, max_tokens=30)
    expected = [int(token) for token, _ in steps]
    assert alone(trained, Row(prompt, 30)) == expected


@pytest.mark.parametrize("options", [{}, {"logit_bias": ((7, 50.0),), "repeat_penalty": 1.5}])
def test_logprobs_are_the_models_own(tiny: LoadedModel, options: dict[str, Any]) -> None:
    """Before bias and penalties: log-softmax of the raw logits."""
    prompt = tiny.codec.encode("The quick brown", as_prompt=True)
    row = Row(prompt, 6, Sampling(seed=2, logprobs=20, **options))
    _together(tiny, [row])
    model: Any = tiny
    logits = model._model(mx.array([[*prompt, *row.ids]]))[0]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for i, entry in enumerate(row.logprobs):
        at = expected[len(prompt) - 1 + i]
        assert entry.token_id == row.ids[i]
        assert entry.logprob == pytest.approx(at[entry.token_id], abs=1e-3)
        assert [id_ for id_, _ in entry.top[:3]] == [int(j) for j in np.argsort(-at)[:3]]
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert max(values) <= 0
        np.testing.assert_allclose(values, -np.sort(-at)[:20], atol=1e-3)


def test_a_bias_of_minus_hundred_bans(tiny: LoadedModel) -> None:
    prompt = tiny.codec.encode("The", as_prompt=True)
    free = set(alone(tiny, Row(prompt, 20)))
    banned = replace(GREEDY, logit_bias=tuple((id_, -100.0) for id_ in free))
    assert not free & set(alone(tiny, Row(prompt, 20, banned)))
    forced = replace(GREEDY, logit_bias=((42, 100.0),))
    assert alone(tiny, Row(prompt, 5, forced)) == [42] * 5


def test_the_outermost_options_do_not_raise(tiny: LoadedModel) -> None:
    vocab = tiny.info.vocab_size
    samplings = [
        Sampling(top_k=vocab, temperature=100.0, top_p=1.0),
        Sampling(top_k=0, min_p=1.0, top_p=1.4e-45, temperature=1.4e-45),
        Sampling(repeat_penalty=1.4e-45, frequency_penalty=-100, presence_penalty=100),
        Sampling(repeat_last_n=2**31 - 1, repeat_penalty=100, logprobs=20),
        Sampling(logit_bias=tuple((i, -100.0) for i in range(vocab)), logprobs=0),
        Sampling(seed=-(2**63)),
    ]
    rows = [Row([1, 2, 3], 8, sampling) for sampling in samplings]
    for ids in _together(tiny, rows):
        assert all(0 <= id_ < vocab for id_ in ids)


def test_progress_of_a_long_prompt(tiny: LoadedModel) -> None:
    prompt = [i % 500 for i in range(700)]
    row = Row(prompt, 2)
    _together(tiny, [row])
    evaluated = [done for done, _ in row.progress]
    assert len(evaluated) >= 2
    assert evaluated == sorted(set(evaluated))
    assert {total for _, total in row.progress} == {700}


def test_logits_are_float32_whatever_the_model_holds(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path]
) -> None:
    """A row's rounding must not depend on what its neighbours ask for."""
    model: Any = load(model_dir(dtype="bfloat16"), dtype=Dtype.AS_STORED)
    assert model.info.dtype == "bfloat16"
    batch = model.new_batch()
    logits = batch._generator.model(mx.zeros((1, 3), dtype=mx.int32))
    batch.close()
    assert logits.dtype == mx.float32
