"""Requests of the pool soak, the classification of refusals, and its callers on a fake runner."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from runner_client import (
    AsyncRunnerClient,
    InsufficientMemoryError,
    ModelState,
    PoolModel,
    PoolStatus,
    RunnerError,
    RunnerTimeoutError,
    RunnerUnavailableError,
)
from soak.pool import callers, watch
from soak.pool.callers import Caller, Known, reference
from soak.pool.mix import (
    CANCELLED_SHARE,
    CUT_SHARE,
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    PROMPTS,
    STAYING_SHARE,
    TIMEOUT_SHARE,
    PoolMix,
    known_prompts,
)
from soak.pool.models import VOCABULARY
from soak.pool.outcome import Look, judge
from soak.pool.records import STOPPING, UNKNOWN, Phase, PoolOrder
from soak.pool.session import look_at
from soak.records import Ending
from support.harness import Server

MODELS = ("a", "b", "c")


def _orders(count: int, seed: str = "0") -> list[PoolOrder]:
    mix = PoolMix(MODELS, seed, "c")
    return [mix.next() for _ in range(count)]


def test_the_same_seed_makes_the_same_requests() -> None:
    assert _orders(100) == _orders(100)
    assert _orders(100) != _orders(100, seed="1")
    assert known_prompts(0) == known_prompts(0)
    assert known_prompts(0) != known_prompts(1)


def test_requests_are_of_the_planned_kinds_and_bounds() -> None:
    orders = _orders(3000)

    def share(count: int) -> float:
        return count / len(orders)

    assert share(sum(o.cancel_seconds is not None for o in orders)) == pytest.approx(
        CANCELLED_SHARE, abs=0.03
    )
    assert share(sum(o.cancel_tokens is not None for o in orders)) == pytest.approx(
        CUT_SHARE, abs=0.03
    )
    assert share(sum(not o.may_evict for o in orders)) == pytest.approx(STAYING_SHARE, abs=0.03)
    assert share(sum(o.timeout_seconds is not None for o in orders)) == pytest.approx(
        TIMEOUT_SHARE, abs=0.03
    )
    assert {o.prompt for o in orders} == set(range(PROMPTS))
    assert {o.count for o in orders} == set(range(1, MAX_NEW_TOKENS + 1))


def test_models_are_local_and_the_first_is_the_most_frequent() -> None:
    models = [order.model for order in _orders(3000)]
    counts = [models.count(name) for name in MODELS]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] > 300
    assert models[0] == "c"
    repeated = sum(one == next_ for one, next_ in itertools.pairwise(models))
    assert repeated > len(models) / 2


def test_known_prompts_are_valid() -> None:
    prompts = known_prompts(0)
    assert len(prompts) == PROMPTS
    for prompt in prompts:
        assert 2 <= len(prompt) <= MAX_PROMPT_TOKENS
        assert all(0 <= token < VOCABULARY for token in prompt)


PLAIN = PoolOrder("a", 0, 5)
STAYING = replace(PLAIN, may_evict=False)
SHARED = replace(PLAIN, may_be_short=True)
SHORT = InsufficientMemoryError("too little", required_bytes=2, available_bytes=1)
LATE = RunnerTimeoutError("late", phase="load", timeout_seconds=1.0)
READY, ROOM = Look(is_ready=True), Look(has_room=True)


@pytest.mark.parametrize(
    ("order", "error", "before", "after", "ending"),
    [
        (STAYING, SHORT, Look(), Look(), Ending.DECLINED),
        (STAYING, SHORT, READY, Look(), Ending.DECLINED),
        (STAYING, SHORT, ROOM, Look(), Ending.DECLINED),
        (STAYING, SHORT, Look(), READY, Ending.DECLINED),
        (SHARED, SHORT, Look(), Look(), Ending.DECLINED),
        (replace(PLAIN, timeout_seconds=1.0), LATE, Look(), Look(), Ending.EXPIRED),
    ],
)
def test_expected_failures_are_not_problems(
    order: PoolOrder, error: RunnerError, before: Look, after: Look, ending: Ending
) -> None:
    assert judge(order, error, 1.0, before, after) == (ending, "")


@pytest.mark.parametrize(
    ("order", "error", "look", "words"),
    [
        (PLAIN, SHORT, Look(), "may go"),
        (STAYING, SHORT, READY, "was loaded"),
        (STAYING, SHORT, ROOM, "room"),
        (STAYING, InsufficientMemoryError("no"), Look(), "numbers"),
        (
            SHARED,
            InsufficientMemoryError("no", required_bytes=5, available_bytes=5),
            Look(),
            "5 bytes were available",
        ),
    ],
)
def test_wrong_refusals_are_problems(
    order: PoolOrder, error: RunnerError, look: Look, words: str
) -> None:
    ending, problem = judge(order, error, 1.0, look, look)
    assert ending is Ending.WRONGLY_REFUSED
    assert words in problem


@pytest.mark.parametrize(
    ("order", "error", "seconds"),
    [
        (PLAIN, LATE, 1.0),
        (replace(PLAIN, timeout_seconds=1.0), LATE, 0.5),
        (
            replace(PLAIN, timeout_seconds=1.0),
            RunnerTimeoutError("late", phase="call", timeout_seconds=1.0),
            1.0,
        ),
        (PLAIN, RunnerUnavailableError("gone"), 1.0),
    ],
)
def test_other_errors_are_problems(order: PoolOrder, error: RunnerError, seconds: float) -> None:
    ending, problem = judge(order, error, seconds, Look(), Look())
    assert ending is Ending.FAILED
    assert type(error).__name__ in problem


def _status(state: ModelState, held: int, waiting: int = 0, budget: int | None = 10) -> PoolStatus:
    model = PoolModel("a", "/a", state, held, {}, waiting_count=waiting)
    return PoolStatus(budget, held, (model,))


@pytest.mark.parametrize(
    ("status", "look"),
    [
        (_status(ModelState.READY, 4), Look(is_ready=True, has_room=True)),
        (_status(ModelState.READY, 6), Look(is_ready=True, has_room=False)),
        (_status(ModelState.ABSENT, 0), Look(is_ready=False, has_room=True)),
        (_status(ModelState.ABSENT, 0, waiting=1), Look()),
        (_status(ModelState.LOADING, 6), Look()),
        (_status(ModelState.ABSENT, 0, budget=None), Look()),
    ],
)
def test_a_look_is_the_state_of_model_and_budget(status: PoolStatus, look: Look) -> None:
    assert look_at(status, "a", 5) == look


async def _outcome(server: Server, order: PoolOrder, known: Known) -> Phase:
    """Send one request to the server, through a caller."""
    phase = Phase("one", 1.0, 1, {"a": 1}, frozenset({"it"}))

    @asynccontextmanager
    async def lease(_: PoolOrder) -> AsyncIterator[AsyncRunnerClient]:
        async with AsyncRunnerClient(server.ready.target) as client:
            yield client

    caller = Caller("it", lease, lambda _: Look(), PoolMix(["a"], "0", "a"), known, phase)
    await caller.ask(order)
    return phase


async def _known(server: Server) -> Known:
    prompts = [(1, 2, number) for number in range(PROMPTS)]
    async with AsyncRunnerClient(server.ready.target) as client:
        answers = [await reference(client, prompt) for prompt in prompts]
    return Known(prompts, {"a": answers})


async def test_a_right_answer_is_counted(loaded: Server) -> None:
    phase = await _outcome(loaded, PLAIN, await _known(loaded))
    tally = phase.tally
    assert tally.endings == {Ending.DONE: 1}
    assert (tally.compared, tally.differing, tally.tokens) == (1, 0, 5)
    assert phase.served == {"it": 1}
    assert len(tally.first_seconds) == len(tally.queue_seconds) == 1


async def test_a_wrong_answer_is_a_problem(loaded: Server) -> None:
    known = await _known(loaded)
    other = Known(known.prompts, {"a": [(1, *answer[1:]) for answer in known.answers["a"]]})
    tally = (await _outcome(loaded, PLAIN, other)).tally
    assert tally.differing == tally.problem_count == 1


async def test_a_cut_answer_is_compared_as_far_as_it_goes(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fake model sends many tokens in a message.
    monkeypatch.setattr(callers, "MAX_NEW_TOKENS", 3000)
    known = await _known(loaded)
    order = replace(PLAIN, count=3000, cancel_tokens=2)
    tally = (await _outcome(loaded, order, known)).tally
    assert tally.endings == {Ending.CANCELLED: 1}
    assert (tally.compared, tally.prefixes, tally.differing) == (0, 1, 0)


async def test_a_request_that_does_not_end_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "STUCK_SECONDS", 0.05)
    phase = Phase("one", 1.0, 1, {"a": 1}, frozenset({"it"}))

    @asynccontextmanager
    async def lease(_: PoolOrder) -> AsyncIterator[AsyncRunnerClient]:
        await asyncio.Event().wait()
        yield AsyncRunnerClient("localhost:1")

    known = Known(known_prompts(0), {})
    caller = Caller("it", lease, lambda _: Look(), PoolMix(["a"], "0", "a"), known, phase)
    ending, problem = await caller._serve(PLAIN, [])
    assert ending is Ending.STUCK
    assert "stuck" in problem
    cancelled, _ = await caller._serve(replace(PLAIN, cancel_seconds=0.0), [])
    assert cancelled is Ending.CANCELLED


def test_samples_are_those_of_the_time_span_with_models_by_process(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    rest = '"zombies": [9], "descriptors": 3, "threads": 2, "rss": 1}\n'
    rows = [f'{{"time": {time}, "runners": [[1, 10, 5], [2, 20, 6]], {rest}' for time in (1, 2, 4)]
    path.write_text("".join(rows) + '{"time": 2.5, "runn')
    (sample,) = watch.read(path, 1.5, 3.0, {1: "a"}, {})
    assert (sample.seconds, sample.runners) == (0.5, (("a", 10), (UNKNOWN, 20)))
    assert (sample.held_bytes, sample.pss_bytes, sample.zombies) == (30, 11, (9,))


def test_a_runner_that_stops_counts_as_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    rest = '"zombies": [], "descriptors": 3, "threads": 2, "rss": 1}\n'
    rows = [f'{{"time": {time}, "runners": [[1, 10, 5], [2, 20, 6]], {rest}' for time in (1, 2)]
    path.write_text("".join(rows) + "{")
    models = {1: "a", 2: "b"}
    before, after = watch.read(path, 0, 3, models, {2: 1.5})
    phase = Phase("it", 1.0, 100, {"a": 40, "b": 50}, frozenset())
    assert [phase.promised_bytes(each) for each in (before, after)] == [90, 60]
    assert after.runners == (("a", 10), (STOPPING, 20))


async def test_the_watching_process_samples_this_one(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    async with watch.watching(path):
        while path.read_text(encoding="utf-8").count("\n") < 2:
            await asyncio.to_thread(os.sched_yield)
    first, *_ = watch.read(path, 0, math.inf, {}, {})
    assert first.threads >= 1
    assert first.descriptors >= 3
    assert first.runners == ()


def test_a_copy_of_a_runner_does_not_count() -> None:
    # A runner that forks has a child with its command line for a moment.
    inner = "print(flush=True); input()"
    outer = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {inner!r}, 'runner_server'])"
    )
    command = [sys.executable, "-c", outer, "runner_server"]
    runner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with runner:
        assert runner.stdout
        runner.stdout.readline()
        assert [pid for pid, _, _ in watch.runners(psutil.Process())] == [runner.pid]
        runner.communicate(b"\n")


def test_a_child_that_is_not_reaped_is_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child.pid in watch.zombies(psutil.Process())
    child.wait()
    assert child.pid not in watch.zombies(psutil.Process())
