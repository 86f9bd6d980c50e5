"""Rows generate the same tokens in a batch as alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import CachePolicy, Sampling, Token
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY, Row, run_alone, run_together
from support.sweeps import diagonal, sampled
from tools.local_batch import LocalBatch

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
    Sampling(seed=3, min_predict=9, end_ids=tuple(range(0, 2048, 3))),
    Sampling(
        seed=4, top_k=0, top_p=0.95, temperature=1.1, frequency_penalty=0.4, counts_output_only=True
    ),
    replace(GREEDY, logprobs=3),
    Sampling(seed=5, min_p=0.1, presence_penalty=0.6, logprobs=1),
]


def _rows(model: LoadedModel, samplings: list[Sampling], count: int) -> list[Row]:
    prompts = [model.codec.encode(text, as_prompt=True) for text in PROMPTS]
    return [Row(p, count + i, s) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))]


_CACHE: dict[str, list[int]] = {}


def _alone(model: LoadedModel, rows: list[Row]) -> list[list[int]]:
    """Return the tokens of each row run alone, from a cache if known."""
    for row in rows:
        key = repr((row.prompt, row.count, row.sampling))
        if key not in _CACHE:
            _CACHE[key] = run_alone(model, row)
    return [_CACHE[repr((row.prompt, row.count, row.sampling))] for row in rows]


@pytest.mark.parametrize(("spacing", "samplings"), diagonal([0, 1, 3], [[GREEDY] * 8, MIXED]))
def test_rows_generate_the_same_tokens_batched_as_alone(
    trained: LoadedModel, samplings: list[Sampling], spacing: int
) -> None:
    rows = _rows(trained, samplings, 16)
    for i, row in enumerate(rows):
        row.late = i * spacing
    assert run_together(trained, rows) == _alone(trained, rows)


def test_a_row_may_join_at_any_step(trained: LoadedModel) -> None:
    long = trained.codec.encode(PROMPTS[0], as_prompt=True)
    other = trained.codec.encode(PROMPTS[7], as_prompt=True)
    expected = [run_alone(trained, Row(long, 20)), run_alone(trained, Row(other, 5))]
    for late in range(0, 12, 2):
        rows = [Row(long, 20), Row(other, 5, late=late)]
        assert run_together(trained, rows) == expected


def test_removing_rows_does_not_change_the_others(trained: LoadedModel) -> None:
    draw = random.Random(2)  # noqa: S311 - chooses rows
    keep = Row(trained.codec.encode(PROMPTS[1], as_prompt=True), 40)
    expected = run_alone(trained, keep)
    batch = LocalBatch.of(trained)
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


@pytest.mark.parametrize(
    "shape", sampled(["llama", "qwen3", "gemma3", "lfm2", "mamba2"], ["llama", "gemma3", "mamba2"])
)
def test_batched_log_probabilities_match_those_alone(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path], shape: str
) -> None:
    """Random weights make near-ties, so log probabilities are compared."""
    model = load(model_dir(shape), parallel=8)
    draw = random.Random(5)  # noqa: S311 - prompts
    prompts = [[draw.randrange(500) for _ in range(n)] for n in (1, 2, 30, 33, 64, 150, 5, 90)]
    sampling = replace(GREEDY, logprobs=20)
    rows = [Row(prompt, 12, sampling, late=i) for i, prompt in enumerate(prompts)]
    run_together(model, rows)
    for row in rows:
        single = Row(row.prompt, 12, sampling)
        run_together(model, [single])
        assert len(row.logprobs) == len(single.logprobs) == 12
        assert_logprobs_close(row.logprobs, single.logprobs)


def test_the_same_seed_gives_the_same_text(tiny: LoadedModel) -> None:
    prompt = tiny.codec.encode("seeded", as_prompt=True)
    row = Row(prompt, 25, Sampling(seed=-9, temperature=1.5, top_p=1.0, top_k=0))
    first = run_alone(tiny, row)
    assert run_alone(tiny, row) == first
    assert run_alone(tiny, replace(row, sampling=replace(row.sampling, seed=9))) != first


_CHILD = """
import sys
from support.rows import Row, run_alone, run_together, run_rows, run_alone
from runner_server.mlx_backend import MlxBackend
from runner_server.engine.types import CachePolicy, LoadSpec, Sampling
backend = MlxBackend()
backend.open()
model = backend.load(LoadSpec(sys.argv[1], parallel=2), lambda _: None)
prompt = model.codec.encode("def main(", as_prompt=True)
print(run_alone(model, Row(prompt, 20, Sampling(seed=21))))
backend.close()
"""


def test_the_same_seed_gives_the_same_text_in_another_process_and_in_a_batch(
    trained: LoadedModel,
) -> None:
    sampling = Sampling(seed=21)
    rows = _rows(trained, [sampling, *MIXED[1:]], 20)
    together = run_together(trained, rows)[0]
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


def test_temperature_zero_matches_greedy_decoding_of_mlx_lm(trained: LoadedModel) -> None:
    from mlx_lm.generate import generate_step

    model: Any = trained
    prompt = trained.codec.encode(PROMPTS[3], as_prompt=True)
    steps = generate_step(mx.array(prompt), model._model, max_tokens=30)
    expected = [int(token) for token, _ in steps]
    assert run_alone(trained, Row(prompt, 30)) == expected


@pytest.mark.parametrize("arrive", ["together", "one by one"])
def test_temperature_zero_matches_batches_of_mlx_lm(trained: LoadedModel, arrive: str) -> None:
    from mlx_lm.generate import BatchGenerator

    model: Any = trained
    rows = _rows(trained, [GREEDY] * 8, 30)
    generator: Any = BatchGenerator(model._model, completion_batch_size=8)
    uids = generator.insert([list(row.prompt) for row in rows], [row.count for row in rows])
    generated: dict[int, list[int]] = {uid: [] for uid in uids}
    while any(len(generated[uid]) < row.count for uid, row in zip(uids, rows, strict=True)):
        for response in generator.next()[1]:
            generated[response.uid].append(int(response.token))
    generator.close()
    for i, row in enumerate(rows):
        row.late = i * 2 if arrive == "one by one" else 0
    assert run_together(trained, rows) == [generated[uid] for uid in uids]


def run_with_preemptions(batch: LocalBatch, rows: list[Row], preempt_steps: dict[int, int]) -> None:
    """Run rows; preempt row ``i`` for ``preempt_steps[i]`` steps after each of its tokens."""
    for id_, row in enumerate(rows):
        policy = CachePolicy(salt=row.adapter)
        batch.add(id_, row.prompt, row.sampling, policy, adapter=row.adapter)
    live, waits = set(range(len(rows))), dict[int, int]()
    while live:
        for id_ in [id_ for id_, left in waits.items() if left <= 0 or live == set(waits)]:
            batch.resume(id_)
            del waits[id_]
        tokens = [event for event in batch.step() if isinstance(event, Token)]
        for event in tokens:
            row = rows[event.row]
            assert event.row not in waits, "a token of a preempted row"
            row.ids.append(event.token_id)
            row.logprobs += [event.logprob] if event.logprob else []
            if len(row.ids) == row.count:
                batch.remove([event.row])
                live.discard(event.row)
            elif event.row in preempt_steps:
                batch.preempt(event.row)
                waits[event.row] = preempt_steps[event.row]
        waits = {id_: left - 1 for id_, left in waits.items()}
    batch.close()


def test_a_lone_row_preempted_at_every_step_continues_correctly(trained: LoadedModel) -> None:
    rows = _rows(trained, MIXED, 16)
    for row, ids in zip(rows, _alone(trained, rows), strict=True):
        run_with_preemptions(LocalBatch.of(trained), [row], {0: 0})
        assert row.ids == ids


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_rows_preempted_at_every_step_continue_correctly(trained: LoadedModel, steps: int) -> None:
    rows = _rows(trained, MIXED, 16)
    expected = _alone(trained, rows)
    run_with_preemptions(
        LocalBatch.of(trained), rows, {0: steps, 3: steps + 1, 4: 0, 6: steps, 7: steps}
    )
    assert [row.ids for row in rows] == expected


@pytest.mark.parametrize(
    ("shape", "among"), diagonal(["llama", "gemma3", "lfm2", "mamba2"], [1, 5])
)
def test_a_preempted_row_keeps_its_log_probabilities(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path], shape: str, among: int
) -> None:
    """Covers every kind of cache; windows of 32 tokens have wrapped in some rows only."""
    model = load(model_dir(shape), parallel=8)
    draw = random.Random(7)  # noqa: S311 - prompts
    lengths = (40, 1, 20, 90, 31)[:among]
    prompts = [[draw.randrange(1, 500) for _ in range(n)] for n in lengths]
    sampling = replace(GREEDY, logprobs=20, logprob_token_ids=(3, 4))
    rows = [Row(prompt, 16, sampling) for prompt in prompts]
    run_with_preemptions(LocalBatch.of(model), rows, dict.fromkeys(range(0, among, 2), 2))
    for row in rows:
        single = Row(row.prompt, 16, sampling)
        run_together(model, [single])
        assert [entry.token_id for entry in row.logprobs] == row.ids
        assert len(row.logprobs) == 16
        assert_logprobs_close(row.logprobs, single.logprobs)


@pytest.mark.parametrize("others", [0, 2])
def test_a_preempted_row_can_be_removed(trained: LoadedModel, others: int) -> None:
    keep = _rows(trained, MIXED, 20)[:others]
    expected = _alone(trained, keep)
    batch: Any = LocalBatch.of(trained)
    for id_, row in enumerate([*keep, Row(keep[0].prompt if keep else [1, 2], 20)]):
        batch.add(id_, row.prompt, row.sampling)
    generated: list[list[int]] = [[] for _ in keep]
    while True:
        tokens = [event for event in batch.step() if isinstance(event, Token)]
        for event in tokens:
            if event.row < others:
                generated[event.row].append(event.token_id)
        if any(event.row == others for event in tokens):
            break
    batch.preempt(others)
    batch.remove([others])
    assert not batch.executor._outside
    while any(len(ids) < 20 for ids in generated):
        events = batch.step()
        assert all(event.row != others for event in events)
        for event in events:
            if isinstance(event, Token):
                generated[event.row].append(event.token_id)
    batch.close()
    assert [ids[:20] for ids in generated] == [ids[:20] for ids in expected]
