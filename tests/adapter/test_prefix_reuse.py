"""Prompts with a common beginning share KV caches, without changing the output."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runner_server.engine.prefill_policy import MAX_SECONDS, MIN_SECONDS
from runner_server.engine.prefix_cache import PrefixCache
from runner_server.engine.types import LoadSpec, Prefill, Sampling, Token, TokenLogprob
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend import MlxBackend  # noqa: E402
from runner_server.mlx_backend.batch import MlxBatch  # noqa: E402

SHAPES = ["llama", "gemma3", "lfm2", "mamba2"]
CUTTABLE = {"llama"}
"""Shapes whose caches can be cut anywhere; others keep a beginning at snapshots only."""

CHUNK = 64
PACE = 2000.0
PLENTY = 1 << 28
MAX_STEPS = 3000
WITH_LOGPROBS = replace(GREEDY, logprobs=8)


class CountingModel:
    """Model which counts input tokens, and derives a clock from the count.

    Attributes:
        tokens: Number of tokens processed, over all rows.
        failures: Raised by the next calls, one per call.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.tokens = 0
        self.failures: list[Exception] = []

    def __call__(self, inputs: Any, cache: Any) -> Any:
        """Call the model."""
        if self.failures:
            raise self.failures.pop(0)
        self.tokens += inputs.size
        return self._model(inputs, cache=cache)

    def clock(self) -> float:
        """Return the time in seconds, at ``PACE`` tokens per second."""
        return self.tokens / PACE


@dataclass
class Result:
    """Results of a row."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    progress: list[Prefill] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Number of prompt tokens taken from the prefix cache."""
        return self.progress[-1].cached


class Bench:
    """A model with a prefix cache and a batch stepped by the test."""

    def __init__(self, model: Any, budget: int = PLENTY) -> None:
        self.counting: Any = CountingModel(model._model)
        self.vocab_size = model.info.vocab_size
        self.pieces = model._pieces
        self.cache: Any = PrefixCache(self.pieces, budget)
        self.results: dict[int, Result] = {}
        self.renew()

    def renew(self) -> None:
        """Start a new batch on the same prefix cache."""
        self.batch = MlxBatch(
            self.counting, self.vocab_size, CHUNK, self.pieces, self.cache, self.counting.clock
        )

    def add(self, row: int, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Result:
        """Start a row."""
        self.batch.add(row, prompt, sampling)
        self.results[row] = Result()
        return self.results[row]

    def step(self) -> None:
        """Make a step and check the invariants."""
        for event in self.batch.step():
            result = self.results[event.row]
            if isinstance(event, Prefill):
                self._note(result, event)
                continue
            assert isinstance(event, Token)
            result.ids.append(event.token_id)
            if event.logprob:
                result.logprobs.append(event.logprob)
        assert self.cache.nbytes <= self.cache.usage.limit_bytes

    def _note(self, result: Result, event: Prefill) -> None:
        last = result.progress[-1] if result.progress else Prefill(event.row, 0, event.total)
        assert not result.ids, "progress after a token"
        assert last.prefilled <= event.prefilled < event.total
        assert last.cached <= event.cached <= event.prefilled
        result.progress.append(event)

    def run(self, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> Result:
        """Run a row from start to end in the current batch."""
        row = len(self.results)
        result = self.add(row, prompt, sampling)
        for _ in range(MAX_STEPS):
            self.step()
            if len(result.ids) >= count:
                self.batch.remove([row])
                return result
        raise AssertionError("the row does not end")

    def run_counting(self, prompt: Sequence[int], count: int = 1) -> tuple[int, Result]:
        """Run a row; return the number of tokens the model processed, and the results."""
        before = self.counting.tokens
        result = self.run(prompt, count)
        return self.counting.tokens - before, result


MakeBench = Callable[..., Bench]


@pytest.fixture(scope="module")
def make_bench(load: Callable[..., Any], model_dir: Callable[..., Path]) -> MakeBench:
    """Make benches for a shape, each with an empty prefix cache."""
    models: dict[str, Any] = {}

    def make(shape: str, budget: int = PLENTY, **changes: Any) -> Bench:
        key = f"{shape} {changes}"
        if key not in models:
            models[key] = load(model_dir(shape, **changes), parallel=8, prefix_cache_bytes=0)
        return Bench(models[key], budget)

    return make


def _random(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)  # noqa: S311 - prompts
    return [draw.randrange(1, 500) for _ in range(length)]


def _assert_results_close(some: Result, other: Result) -> None:
    assert len(some.logprobs) == len(other.logprobs)
    assert_logprobs_close(some.logprobs, other.logprobs)


# -- prefill and reuse -----------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [2, 31, 200])
def test_a_repeated_prompt_is_not_prefilled_again(
    make_bench: MakeBench, shape: str, length: int
) -> None:
    prompt = _random(length, 1)
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [40, 128, 150])
def test_a_shared_prefix_is_prefilled_once(make_bench: MakeBench, shape: str, length: int) -> None:
    system = _random(length, 2)
    bench = make_bench(shape)
    cached = [
        bench.run(system + _random(20 + i, 10 + i), 4, WITH_LOGPROBS).cached for i in range(5)
    ]
    if shape in CUTTABLE:
        assert cached == [0, length, length, length, length]
    else:
        # The second prompt shows where they diverge; a snapshot is taken there for the others.
        assert cached == [0, 0, length, length, length]
    plain = make_bench(shape, budget=0)
    for i, result in enumerate(list(bench.results.values())):
        _assert_results_close(result, plain.run(system + _random(20 + i, 10 + i), 4, WITH_LOGPROBS))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turns", [4])
def test_a_conversation_prefills_only_new_tokens(
    make_bench: MakeBench, shape: str, turns: int
) -> None:
    bench, plain = make_bench(shape), make_bench(shape, budget=0)
    history = _random(70, 3)
    known = 0
    for turn in range(turns):
        result = bench.run(history, 9, WITH_LOGPROBS)
        assert result.cached == known
        _assert_results_close(result, plain.run(history, 9, WITH_LOGPROBS))
        known = len(history) + 9
        history = [*history, *result.ids, *_random(12, 30 + turn)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 60, 64, 65, 149])
def test_a_prefix_of_an_earlier_prompt_reuses_caches_that_can_be_cut(
    make_bench: MakeBench, shape: str, length: int
) -> None:
    longer = _random(150, 4)
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
    prompt = _random(50, 5)
    answer = bench.run(prompt, 20).ids
    other = [*prompt, *answer[:10], *_random(30, 6)]
    for _ in range(3):
        result = bench.run(other, 5, WITH_LOGPROBS)
        _assert_results_close(result, plain.run(other, 5, WITH_LOGPROBS))
    assert result.cached == len(other) - 1


@pytest.mark.parametrize("shape", ["llama", "gemma3", "lfm2"])
def test_without_a_budget_nothing_is_kept(make_bench: MakeBench, shape: str) -> None:
    bench = make_bench(shape, budget=0)
    prompt = _random(100, 7)
    assert {bench.run(prompt, 3).cached for _ in range(3)} == {0}
    assert bench.cache.nbytes == len(bench.cache) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_concurrent_rows_with_the_same_prompt_share_the_prefill(
    make_bench: MakeBench, shape: str
) -> None:
    """One row takes over the prefill of the other while both are running."""
    bench = make_bench(shape)
    prompt = _random(600, 8)
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
    prompt = _random(1900, 9)
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
    bench.add(0, _random(100, 9))
    bench.batch.remove([0])
    assert len(bench.cache) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("neighbours", [0, 2])
@pytest.mark.parametrize("is_preempted", [False, True], ids=["decoding", "set aside"])
def test_the_tokens_of_a_cancelled_row_are_kept(
    make_bench: MakeBench, shape: str, neighbours: int, is_preempted: bool
) -> None:
    """Exactly the tokens given to the row are kept; more would be wrong."""
    bench = make_bench(shape)
    for row in range(1, 1 + neighbours):
        bench.add(row, _random(20 * row, 40 + row))
    result = bench.add(0, _random(45, 11))
    while len(result.ids) < 7:
        bench.step()
    if is_preempted:
        bench.batch.preempt(0)
    bench.batch.remove([0])
    history = [*_random(45, 11), *result.ids]
    going_on = [*history, *_random(5, 12)]
    again = bench.run(going_on, 6, WITH_LOGPROBS)
    assert again.cached == len(history)
    _assert_results_close(again, make_bench(shape, budget=0).run(going_on, 6, WITH_LOGPROBS))


@pytest.mark.parametrize("shape", ["llama", "gemma3", "lfm2"])
def test_a_failing_step_does_not_damage_the_prefix_cache(make_bench: MakeBench, shape: str) -> None:
    bench = make_bench(shape)
    prompt = _random(150, 13)
    first = bench.run(prompt, 5, WITH_LOGPROBS)
    kept = bench.cache.nbytes
    bench.add(5, _random(90, 14))
    bench.add(6, prompt)
    for _ in range(2):
        bench.counting.failures.append(RuntimeError("out of memory"))
        with pytest.raises(RuntimeError):
            bench.step()
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
    [("llama", {}), ("llama", ONE_HEAD), ("gemma3", {}), ("lfm2", {}), ("mamba2", {})],
    ids=["llama", "one head", "gemma3", "lfm2", "mamba2"],
)
def test_the_prefix_cache_stays_within_its_budget(
    make_bench: MakeBench, shape: str, changes: dict[str, int]
) -> None:
    """The cache keeps to its budget, by its own count and by MLX's."""
    budget = 400_000
    bench = make_bench(shape, budget, **changes)
    bench.run(_random(100, 1), 2)
    mx.clear_cache()
    before = mx.get_active_memory() - bench.cache.nbytes
    held: list[int] = []
    beside: list[int] = []
    for i in range(200):
        bench.run(_random(40, 100 + i), 2)
        held.append(bench.cache.nbytes)
        beside.append(mx.get_active_memory() - before - bench.cache.nbytes)
        bench.results.clear()
    assert max(held) <= budget
    assert min(held[100:]) > budget * 0.6
    assert len(bench.cache) < 200
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
    batch = model.new_batch()
    for row in range(5):
        batch.add(row, _random(200, row), GREEDY)
    while not any(isinstance(event, Token) for event in batch.step()):
        pass
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


# -- random schedules ------------------------------------------------------------


@dataclass(frozen=True)
class ScriptedRequest:
    """A request: a shared beginning, a separate end, and the events during its run."""

    shared: int
    length: int
    own: int
    count: int
    late: int
    cancelled: int | None
    preempted: int | None


REQUESTS = st.builds(
    ScriptedRequest,
    shared=st.integers(0, 2),
    length=st.sampled_from([0, 1, 30, 64, 100, 150]),
    own=st.sampled_from([0, 1, 1, 2, 3]),
    count=st.integers(1, 10),
    late=st.integers(0, 12),
    cancelled=st.none() | st.integers(0, 9),
    preempted=st.none() | st.integers(1, 4),
)
BUDGETS = st.sampled_from([0, 30_000, 200_000, PLENTY])
ANYTHING = settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _prompt(request: ScriptedRequest) -> list[int]:
    beginning = _random(150, 1000 + request.shared)[: request.length]
    return [*beginning, *_random(1 + request.own * 9, 2000 + request.own)]


class Schedule:
    """Runs requests in one batch, each with scheduled arrival, preemption and cancellation.

    Args:
        bench: Bench to run on.
        requests: The requests, by row.
        sampling: Sampling options of each request.
    """

    def __init__(
        self, bench: Bench, requests: Sequence[ScriptedRequest], sampling: list[Sampling]
    ) -> None:
        self._bench = bench
        self._requests = requests
        self._sampling = sampling
        self._live: set[int] = set()
        self._preempted: set[int] = set()
        self._was_preempted: set[int] = set()

    def run(self) -> None:
        """Run until every request has ended."""
        for step in range(MAX_STEPS):
            for row, request in enumerate(self._requests):
                if request.late == step:
                    self._bench.add(row, _prompt(request), self._sampling[row])
                    self._live.add(row)
            for row in list(self._live):
                self._pass(row, step)
            if self._live - self._preempted:
                self._bench.step()
            elif not self._live and step > 12:
                return
            for row in [row for row in self._live if self._has_ended(row)]:
                self._end(row)
        raise AssertionError("the rows do not end")

    def _has_ended(self, row: int) -> bool:
        return len(self._bench.results[row].ids) >= self._requests[row].count

    def _end(self, row: int) -> None:
        self._bench.batch.remove([row])
        self._live.discard(row)
        self._preempted.discard(row)

    def _pass(self, row: int, step: int) -> None:
        """Apply the cancellation, preemption or resumption due for a row."""
        request, result = self._requests[row], self._bench.results[row]
        if request.cancelled is not None and step == request.late + request.cancelled:
            self._end(row)
        elif row in self._preempted:
            self._bench.batch.resume(row)
            self._preempted.discard(row)
        elif request.preempted == len(result.ids) and row not in self._was_preempted:
            self._bench.batch.preempt(row)
            self._preempted.add(row)
            self._was_preempted.add(row)


@pytest.mark.parametrize("shape", [*SHAPES, "qwen3"])
@example(
    requests=[ScriptedRequest(0, 100, own, 6, 0, None, 2 if own == 1 else None) for own in range(4)]
    * 2,
    budget=PLENTY,
)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=8), budget=BUDGETS)
@ANYTHING
def test_log_probabilities_do_not_depend_on_other_requests(
    make_bench: MakeBench, shape: str, requests: list[ScriptedRequest], budget: int
) -> None:
    bench = make_bench(shape, budget)
    Schedule(bench, requests, [WITH_LOGPROBS] * len(requests)).run()
    for row, each in enumerate(requests):
        result, alone = bench.results[row], _alone(make_bench, shape, tuple(_prompt(each)))
        assert len(result.logprobs) <= 10
        assert_logprobs_close(result.logprobs, alone.logprobs)


_ALONE: dict[tuple[str, tuple[int, ...]], Result] = {}


def _alone(make_bench: MakeBench, shape: str, prompt: tuple[int, ...]) -> Result:
    """Return the results of a prompt run alone without a prefix cache, memoized."""
    key = shape, prompt
    if key not in _ALONE:
        _ALONE[key] = make_bench(shape, budget=0).run(prompt, 10, WITH_LOGPROBS)
    return _ALONE[key]


OPTIONS = [
    GREEDY,
    replace(GREEDY, repeat_penalty=1.3),
    Sampling(seed=3),
    Sampling(seed=4, top_k=0, top_p=0.95, temperature=1.1),
    Sampling(seed=5, min_p=0.1, presence_penalty=0.6),
]
_TEXTS: dict[tuple[tuple[int, ...], int], list[int]] = {}


@example(
    requests=[ScriptedRequest(0, 100, own, 8, own, None, 2) for own in range(4)] * 2,
    budget=PLENTY,
    options=1,
)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=8), budget=BUDGETS, options=st.integers(0, 4)
)
@settings(ANYTHING, max_examples=6)
def test_texts_do_not_depend_on_other_requests(
    trained: Any, requests: list[ScriptedRequest], budget: int, options: int
) -> None:
    """Trained weights have no near-ties, so even sampled tokens are equal."""
    bench = Bench(trained, budget)
    chosen = [(options + row) % len(OPTIONS) for row in range(len(requests))]
    Schedule(bench, requests, [OPTIONS[i] for i in chosen]).run()
    for row, (each, option) in enumerate(zip(requests, chosen, strict=True)):
        prompt = tuple(_prompt(each))
        if (prompt, option) not in _TEXTS:
            plain = Bench(trained, budget=0)
            _TEXTS[prompt, option] = plain.run(prompt, 10, OPTIONS[option]).ids
        ids = bench.results[row].ids
        assert ids == _TEXTS[prompt, option][: len(ids)]
        if each.cancelled is None:
            assert len(ids) == each.count


# -- fairness --------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(load: Callable[..., Any], model_dir: Callable[..., Path]) -> Any:
    """A model so small that thousands of tokens are cheap."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    path = model_dir("llama", **sizes, **heads, max_position_embeddings=8192)
    return load(path, parallel=8, context_length=8192)


STREAMS = 3
ARRIVALS = 6


@pytest.mark.parametrize("keeps", [0, PLENTY], ids=["no cache", "cache"])
def test_no_stream_waits_long_while_long_prompts_keep_arriving(narrow: Any, keeps: int) -> None:
    """Time is measured by the tokens processed."""
    bench = Bench(narrow, keeps)
    streams = [bench.add(row, _random(30, row)) for row in range(STREAMS)]
    while any(len(result.ids) < 3 for result in streams):
        bench.step()
    arrived: dict[int, float] = {}
    first: dict[int, float] = {}
    gaps: list[float] = []
    clock = bench.counting.clock
    last, made = clock(), [len(result.ids) for result in streams]
    while len(first) < ARRIVALS:
        if len(arrived) < ARRIVALS and clock() > len(arrived) * 0.6:
            row = 10 + len(arrived)
            bench.add(row, _random(4000, row))
            arrived[row] = clock()
        bench.step()
        counts = [len(result.ids) for result in streams]
        # Every stream gets a token in every step.
        assert all(count == before + 1 for count, before in zip(counts, made, strict=True))
        gaps.append(clock() - last)
        last, made = clock(), counts
        for row in arrived.keys() - first.keys():
            if bench.results[row].ids:
                first[row] = clock()
                bench.batch.remove([row])
    rows = STREAMS + ARRIVALS
    assert max(gaps) <= MIN_SECONDS + (16 + 2 * rows) / PACE
    # The long prompts overlap and finish in order, at more than half the pace.
    assert list(first) == sorted(first)
    assert max(first.values()) - arrived[10] < 2 * ARRIVALS * 4000 / PACE


@pytest.mark.parametrize("length", [120, 700])
def test_a_long_prompt_is_served_while_shorter_ones_keep_arriving(narrow: Any, length: int) -> None:
    bench = Bench(narrow, 0)
    stream = bench.add(0, _random(30, 0))
    while not stream.ids:
        bench.step()
    long = bench.add(1, _random(4000, 1))
    began = bench.counting.clock()
    for newest in range(2, 10_000):
        short = bench.add(newest, _random(length, newest))
        while not short.ids and not long.ids:
            bench.step()
        if long.ids:
            break
        bench.batch.remove([newest])
        # The long prompt gets half of the time; decoding takes a part of that.
        assert bench.counting.clock() - began < 4 * 4000 / PACE
    assert long.ids


@pytest.mark.parametrize("length", [1, 20, 200])
def test_a_short_prompt_starts_while_long_ones_are_prefilled(narrow: Any, length: int) -> None:
    bench = Bench(narrow, 0)
    bench.add(0, _random(4000, 0))
    bench.add(1, _random(4000, 1))
    for _ in range(3):
        bench.step()
    began = bench.counting.clock()
    result = bench.add(2, _random(length, 2))
    while not result.ids:
        bench.step()
    # Twice its own prefill, plus the slices in progress on arrival.
    assert bench.counting.clock() - began <= 2 * length / PACE + 2 * MAX_SECONDS
