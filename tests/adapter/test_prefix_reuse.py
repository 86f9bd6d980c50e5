"""Prompts with a common beginning share KV caches, without changing the output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from runner_server.engine.types import CachePolicy, LoadSpec, Token
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY
from tools.local_batch import LocalBatch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend import MlxBackend  # noqa: E402
from support.prefix_bench import (  # noqa: E402
    WITH_LOGPROBS,
    MakeBench,
    Result,
    random_prompt,
)
from support.sweeps import diagonal, sampled  # noqa: E402

SHAPES = ["llama", "gemma3", "lfm2", "mamba2"]
CUTTABLE = {"llama"}
"""Shapes whose caches can be cut anywhere; others keep a beginning at snapshots only."""


def _assert_results_close(some: Result, other: Result) -> None:
    assert len(some.logprobs) == len(other.logprobs)
    assert_logprobs_close(some.logprobs, other.logprobs)


# -- bypass ----------------------------------------------------------------------


BYPASS = CachePolicy(reads=False, writes=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_that_bypasses_the_cache_neither_reads_nor_writes(
    make_bench: MakeBench, shape: str
) -> None:
    prompt = random_prompt(150, 1)
    bench = make_bench(shape)
    alone = bench.run(prompt, 6, WITH_LOGPROBS, BYPASS)
    assert len(bench.cache) == 0
    shared = bench.run(prompt, 6, WITH_LOGPROBS)
    assert shared.cached == 0
    held = bench.cache.nbytes
    again = bench.run([*prompt, 5, 6], 6, WITH_LOGPROBS, BYPASS)
    assert (again.cached, bench.cache.nbytes) == (0, held)
    assert bench.run(prompt, 6, WITH_LOGPROBS).cached == 149
    _assert_results_close(alone, shared)


def test_a_preempted_row_that_bypasses_the_cache_is_not_stored(make_bench: MakeBench) -> None:
    bench = make_bench("llama")
    result = bench.add(0, random_prompt(40, 1), GREEDY, BYPASS)
    while not result.ids:
        bench.step()
    bench.batch.preempt(0)
    bench.batch.remove([0])
    assert len(bench.cache) == 0


# -- prefill and reuse -----------------------------------------------------------


@pytest.mark.parametrize(("shape", "length"), diagonal(SHAPES, [2, 31, 200]))
def test_a_repeated_prompt_is_not_prefilled_again(
    make_bench: MakeBench, shape: str, length: int
) -> None:
    prompt = random_prompt(length, 1)
    bench = make_bench(shape)
    first = bench.run(prompt, 6, WITH_LOGPROBS)
    assert first.cached == 0
    second = bench.run(prompt, 6, WITH_LOGPROBS)
    # The last token is always prefilled, since sampling needs its logits.
    assert second.cached == length - 1
    _assert_results_close(second, first)
    assert bench.run_counting(prompt) == (1, bench.results[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_of_one_token_reuses_nothing(make_bench: MakeBench, shape: str) -> None:
    bench = make_bench(shape)
    assert [bench.run([7], 5).ids for _ in range(3)].count(bench.results[0].ids) == 3
    assert {result.cached for result in bench.results.values()} == {0}


@pytest.mark.parametrize(("shape", "length"), diagonal(SHAPES, [40, 128, 150]))
def test_a_shared_prefix_is_prefilled_once(make_bench: MakeBench, shape: str, length: int) -> None:
    system = random_prompt(length, 2)
    bench = make_bench(shape)
    cached = [
        bench.run(system + random_prompt(20 + i, 10 + i), 4, WITH_LOGPROBS).cached for i in range(5)
    ]
    if shape in CUTTABLE:
        assert cached == [0, length, length, length, length]
    else:
        # The second prompt shows where they diverge; a snapshot is taken there for the others.
        assert cached == [0, 0, length, length, length]
    plain = make_bench(shape, budget=0)
    for i, result in enumerate(list(bench.results.values())):
        _assert_results_close(
            result, plain.run(system + random_prompt(20 + i, 10 + i), 4, WITH_LOGPROBS)
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turns", [4])
def test_a_conversation_prefills_only_new_tokens(
    make_bench: MakeBench, shape: str, turns: int
) -> None:
    bench, plain = make_bench(shape), make_bench(shape, budget=0)
    history = random_prompt(70, 3)
    known = 0
    for turn in range(turns):
        result = bench.run(history, 9, WITH_LOGPROBS)
        assert result.cached == known
        _assert_results_close(result, plain.run(history, 9, WITH_LOGPROBS))
        known = len(history) + 9
        history = [*history, *result.ids, *random_prompt(12, 30 + turn)]


@pytest.mark.parametrize(("shape", "length"), diagonal(SHAPES, [1, 2, 60, 64, 65, 149]))
def test_a_prefix_of_an_earlier_prompt_reuses_caches_that_can_be_cut(
    make_bench: MakeBench, shape: str, length: int
) -> None:
    longer = random_prompt(150, 4)
    bench = make_bench(shape)
    bench.run(longer, 3)
    result = bench.run(longer[:length], 5, WITH_LOGPROBS)
    assert result.cached == (length - 1 if shape in CUTTABLE else 0)
    _assert_results_close(
        result, make_bench(shape, budget=0).run(longer[:length], 5, WITH_LOGPROBS)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_may_diverge_inside_generated_text(make_bench: MakeBench, shape: str) -> None:
    bench, plain = make_bench(shape), make_bench(shape, budget=0)
    prompt = random_prompt(50, 5)
    answer = bench.run(prompt, 20).ids
    other = [*prompt, *answer[:10], *random_prompt(30, 6)]
    for _ in range(3):
        result = bench.run(other, 5, WITH_LOGPROBS)
        _assert_results_close(result, plain.run(other, 5, WITH_LOGPROBS))
    assert result.cached == len(other) - 1


@pytest.mark.parametrize("shape", ["llama", "gemma3", "lfm2"])
def test_without_a_budget_nothing_is_kept(make_bench: MakeBench, shape: str) -> None:
    bench = make_bench(shape, budget=0)
    prompt = random_prompt(100, 7)
    assert {bench.run(prompt, 3).cached for _ in range(3)} == {0}
    assert bench.cache.nbytes == len(bench.cache) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_concurrent_rows_with_the_same_prompt_share_the_prefill(
    make_bench: MakeBench, shape: str
) -> None:
    """One row takes over the prefill of the other while both are running."""
    bench = make_bench(shape)
    prompt = random_prompt(600, 8)
    rows = [bench.add(row, prompt, WITH_LOGPROBS) for row in range(2)]
    while any(len(result.ids) < 5 for result in rows):
        bench.step()
    assert sorted(result.cached for result in rows) == [0, 599]
    assert bench.counting.tokens < 600 + 30
    bench.batch.remove([0, 1])
    alone = make_bench(shape, budget=0).run(prompt, 5, WITH_LOGPROBS)
    for result in rows:
        assert_logprobs_close(result.logprobs, alone.logprobs)


# -- ends of every kind ----------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_finished_part_of_a_cancelled_prefill_is_kept(
    make_bench: MakeBench, shape: str
) -> None:
    bench = make_bench(shape)
    prompt = random_prompt(1900, 9)
    cancelled = bench.add(0, prompt)
    bench.step()
    reached = cancelled.progress[-1].prefilled
    assert 200 < reached < 1899
    bench.batch.remove([0])
    result = bench.run(prompt, 4, WITH_LOGPROBS)
    assert result.cached == reached
    _assert_results_close(result, make_bench(shape, budget=0).run(prompt, 4, WITH_LOGPROBS))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prefill_cancelled_before_it_began_leaves_nothing(
    make_bench: MakeBench, shape: str
) -> None:
    bench = make_bench(shape)
    bench.add(0, random_prompt(100, 9))
    bench.batch.remove([0])
    assert len(bench.cache) == 0


@pytest.mark.parametrize(
    ("shape", "neighbours", "is_preempted"), diagonal(SHAPES, [0, 2], [False, True])
)
def test_the_tokens_of_a_cancelled_row_are_kept(
    make_bench: MakeBench, shape: str, neighbours: int, is_preempted: bool
) -> None:
    """Exactly the tokens given to the row are kept; more would be wrong."""
    bench = make_bench(shape)
    for row in range(1, 1 + neighbours):
        bench.add(row, random_prompt(20 * row, 40 + row))
    result = bench.add(0, random_prompt(45, 11))
    while len(result.ids) < 7:
        bench.step()
    if is_preempted:
        bench.batch.preempt(0)
    bench.batch.remove([0])
    history = [*random_prompt(45, 11), *result.ids]
    going_on = [*history, *random_prompt(5, 12)]
    again = bench.run(going_on, 6, WITH_LOGPROBS)
    assert again.cached == len(history)
    _assert_results_close(again, make_bench(shape, budget=0).run(going_on, 6, WITH_LOGPROBS))


@pytest.mark.parametrize("shape", ["llama", "gemma3", "lfm2"])
def test_a_failing_step_does_not_damage_the_prefix_cache(make_bench: MakeBench, shape: str) -> None:
    bench = make_bench(shape)
    prompt = random_prompt(150, 13)
    first = bench.run(prompt, 5, WITH_LOGPROBS)
    kept = bench.cache.nbytes
    for _ in range(2):
        bench.add(5, random_prompt(90, 14))
        bench.add(6, prompt)
        bench.counting.failures.append(RuntimeError("out of memory"))
        with pytest.raises(RuntimeError):
            bench.step()
        # After an exception the rows are lost, as in the engine.
        bench.batch.close()
        bench.renew()
    assert bench.cache.nbytes == kept
    again = bench.run(prompt, 5, WITH_LOGPROBS)
    assert again.cached == 149
    _assert_results_close(again, first)


# -- memory ----------------------------------------------------------------------


ONE_HEAD = {"num_key_value_heads": 1}
"""With one head, a slice of the keys is contiguous, so a copy may turn out to be a view."""


@pytest.mark.parametrize(
    ("shape", "changes"),
    sampled(
        [("llama", {}), ("llama", ONE_HEAD), ("gemma3", {}), ("lfm2", {}), ("mamba2", {})],
        [("llama", ONE_HEAD), ("gemma3", {}), ("mamba2", {})],
    ),
    ids=["llama", "one head", "gemma3", "lfm2", "mamba2"],
)
def test_the_prefix_cache_stays_within_its_budget(
    make_bench: MakeBench, shape: str, changes: dict[str, int]
) -> None:
    """The cache keeps to its budget, by its own count and by MLX's."""
    budget = 400_000
    bench = make_bench(shape, budget, **changes)
    bench.run(random_prompt(100, 1), 2)
    mx.clear_cache()
    before = mx.get_active_memory() - bench.cache.nbytes
    held: list[int] = []
    beside: list[int] = []
    for i in range(100):
        bench.run(random_prompt(40, 100 + i), 2)
        held.append(bench.cache.nbytes)
        beside.append(mx.get_active_memory() - before - bench.cache.nbytes)
        bench.results.clear()
    assert max(held) <= budget
    assert min(held[50:]) > budget * 0.6
    assert len(bench.cache) < 100
    # Entries own their memory; none is a view of a larger array.
    assert max(beside) <= 60_000


def test_the_prefix_cache_is_counted_and_freed_with_the_model(
    model_dir: Callable[..., Path],
) -> None:
    backend = MlxBackend()
    backend.open()
    backend.release()
    before = mx.get_active_memory()
    model = backend.load(LoadSpec(str(model_dir())), lambda _progress: None)
    empty = backend.memory()
    batch = LocalBatch.of(model)
    for row in range(5):
        batch.add(row, random_prompt(200, row), GREEDY)
    begun: set[int] = set()
    while len(begun) < 5:
        begun |= {event.row for event in batch.step() if isinstance(event, Token)}
    batch.remove(range(5))
    counters = backend.memory()
    # Two layers with keys and values of two heads of 16 float32 for each token.
    assert counters.prefix_cache_bytes >= 5 * 199 * 2 * 2 * 2 * 16 * 4
    assert counters.prefix_cache_bytes <= model.info.prefix_cache_bytes
    kept = counters.active_bytes - empty.active_bytes
    # MLX reuses buffers which may be some pages larger than requested.
    arrays = 4 * len(cast("Any", model)._prompts)
    assert kept == pytest.approx(counters.prefix_cache_bytes, abs=arrays * 4096)
    batch.close()
    del batch, model
    backend.release()
    assert backend.memory().prefix_cache_bytes == 0
    assert mx.get_active_memory() <= before + 50_000
