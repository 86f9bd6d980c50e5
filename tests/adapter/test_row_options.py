"""Options, long prompts and number formats of rows do what they say, alone and in a batch."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Dtype, Sampling
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY, Row, run_alone, run_rows, run_together
from support.sweeps import diagonal
from tools.local_batch import LocalBatch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")


@pytest.mark.parametrize("options", [{}, {"logit_bias": ((7, 50.0),), "repeat_penalty": 1.5}])
def test_log_probabilities_come_from_the_raw_logits(
    tiny: LoadedModel, options: dict[str, Any]
) -> None:
    """Log probabilities are the log-softmax of the raw logits, before bias and penalties."""
    prompt = tiny.codec.encode("The quick brown", as_prompt=True)
    row = Row(prompt, 6, Sampling(seed=2, logprobs=20, **options))
    run_together(tiny, [row])
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


def test_candidates_have_their_log_probabilities_whatever_their_rank(tiny: LoadedModel) -> None:
    """Rows request different numbers of candidates, or none, in one batch."""
    prompt = tiny.codec.encode("The quick brown", as_prompt=True)
    wanted: list[tuple[int, ...]] = [(), (5,), (500, 5, 0, 5), (), (7, 8)]
    rows = [
        Row(prompt, 6, Sampling(seed=i, logprobs=i % 3 if i else None, logprob_token_ids=ids))
        for i, ids in enumerate(wanted)
    ]
    run_together(tiny, rows)
    assert not rows[0].logprobs
    model: Any = tiny
    for row, ids in zip(rows[1:], wanted[1:], strict=True):
        logits = model._model(mx.array([[*prompt, *row.ids]]))[0]
        expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for i, entry in enumerate(row.logprobs):
            at = expected[len(prompt) - 1 + i]
            assert [id_ for id_, _ in entry.candidates] == [*ids]
            np.testing.assert_allclose([v for _, v in entry.candidates], at[list(ids)], atol=1e-3)
            assert len(entry.top) == row.sampling.logprobs


def test_output_only_penalties_ignore_the_prompt(trained: LoadedModel) -> None:
    """A penalty of 100 equals a bias of -100 on generated tokens only."""
    penalty = replace(GREEDY, presence_penalty=100.0, counts_output_only=True)
    prompt = trained.codec.encode("def main(self):\n    self.", as_prompt=True)
    ids = run_alone(trained, Row(prompt, 12, penalty))
    assert ids[0] == run_alone(trained, Row(prompt, 1))[0]
    assert set(ids) & set(prompt)
    for count, id_ in enumerate(ids):
        bias = tuple((seen, -100.0) for seen in sorted(set(ids[:count])))
        row = Row([*prompt, *ids[:count]], 1, replace(GREEDY, logit_bias=bias))
        assert run_alone(trained, row) == [id_]


def test_a_bias_of_minus_100_bans_a_token(tiny: LoadedModel) -> None:
    prompt = tiny.codec.encode("The", as_prompt=True)
    free = set(run_alone(tiny, Row(prompt, 20)))
    banned = replace(GREEDY, logit_bias=tuple((id_, -100.0) for id_ in free))
    assert not free & set(run_alone(tiny, Row(prompt, 20, banned)))
    forced = replace(GREEDY, logit_bias=((42, 100.0),))
    assert run_alone(tiny, Row(prompt, 5, forced)) == [42] * 5


def test_extreme_options_do_not_raise(tiny: LoadedModel) -> None:
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
    for ids in run_together(tiny, rows):
        assert all(0 <= id_ < vocab for id_ in ids)


def test_a_long_prompt_reports_progress(tiny: LoadedModel) -> None:
    prompt = [i % 500 for i in range(700)]
    row = Row(prompt, 2)
    run_together(tiny, [row])
    evaluated = [done for done, _ in row.progress]
    assert len(evaluated) >= 2
    assert evaluated == sorted(set(evaluated))
    assert {total for _, total in row.progress} == {700}


_NEIGHBOURS = [
    GREEDY,
    Sampling(seed=1, top_k=0, top_p=1.0),
    Sampling(seed=2, top_k=100),
    replace(GREEDY, logprobs=5),
    replace(GREEDY, repeat_penalty=1.3),
    replace(GREEDY, logit_bias=((5, 3.0),)),
]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, logprobs=5),
        Sampling(seed=7),
        Sampling(seed=8, top_k=0, top_p=0.9, temperature=1.2),
        replace(GREEDY, frequency_penalty=0.3),
    ],
    ids=["greedy", "logprobs", "top_k", "top_p", "penalty"],
)
def test_half_precision_rows_do_not_depend_on_their_neighbours_options(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path], sampling: Sampling
) -> None:
    """Some options need float32, which would decide near-ties differently."""
    model = load(model_dir(dtype="bfloat16"), dtype=Dtype.AS_STORED, parallel=4)
    assert model.info.dtype == "bfloat16"
    seen = []
    for other in _NEIGHBOURS:
        row = Row([3, 1, 4, 1, 5], 20, sampling)
        run_together(model, [row, Row([2, 7, 1], 20, other), Row([9, 9], 20, other)])
        seen.append((row.ids, row.logprobs))
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    diagonal(
        ["llama", "gemma3", "mamba", "mamba2", "lfm2"], [(40, 40, 40), (40, 33, 25), (40, 3, 39)]
    ),
)
def test_prompts_prefilled_together_match_those_alone(
    load: Callable[..., LoadedModel],
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    lengths: tuple[int, ...],
) -> None:
    """Some recurrent layers treat padding as text; only rows of equal length prefill together."""
    module: Any = importlib.import_module("runner_server.mlx_backend.executor")

    together: list[int] = []
    prefill = module.prefill

    def counting(model: Any, rows: Any, chunks: Any) -> Any:
        together.append(len(rows))
        return prefill(model, rows, chunks)

    monkeypatch.setattr(module, "prefill", counting)
    model = load(model_dir(shape), parallel=8, prefix_cache_bytes=0)
    sampling = replace(GREEDY, logprobs=20)
    draw = random.Random(7)  # noqa: S311 - prompts
    prompts = [[draw.randrange(2, 500) for _ in range(n)] for n in lengths]
    batch = LocalBatch.of(model)
    run = batch.executor.run
    # On a busy machine a slice of real time may be too short for a second prompt.
    monkeypatch.setattr(batch.executor, "run", lambda item: replace(run(item), seconds=0.001))
    run_rows(batch, [Row([5] * 100, 1)])  # calibrates the cost model
    together.clear()
    rows = [Row(prompt, 6, sampling) for prompt in prompts]
    run_rows(batch, rows)
    batch.close()
    if len(set(lengths)) == 1:
        assert max(together) == 3
    for row in rows:
        single = Row(row.prompt, 6, sampling)
        run_together(model, [single])
        assert_logprobs_close(row.logprobs, single.logprobs)
