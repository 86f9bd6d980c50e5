"""Random schedules of requests with common beginnings: no request changes another's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runner_server.engine.types import Sampling
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from support.prefix_bench import (  # noqa: E402
    MAX_STEPS,
    PLENTY,
    WITH_LOGPROBS,
    Bench,
    MakeBench,
    Result,
    random_prompt,
)
from support.sweeps import sampled  # noqa: E402

SHAPES = ["llama", "gemma3", "lfm2", "mamba2"]


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
    beginning = random_prompt(150, 1000 + request.shared)[: request.length]
    return [*beginning, *random_prompt(1 + request.own * 9, 2000 + request.own)]


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


@pytest.mark.parametrize("shape", sampled([*SHAPES, "qwen3"], ["gemma3", "lfm2"]))
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
