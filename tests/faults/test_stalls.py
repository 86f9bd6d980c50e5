"""Fault 3: a step that never returns, and what only looks like one.

That Status answers meanwhile, and that its age is of this work and not of an idle hour, is
shown in tests/server/test_status_while_blocked.py. Here is the client's watchdog.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from pathlib import Path

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import (
    AsyncRunnerProcess,
    Options,
    RunnerProcess,
    State,
    Status,
    Timeouts,
    errors,
)
from runner_client.process.child import exit_in_words
from runner_client.process.stall import StallDetector
from runner_client.rpc.messages import status as status_of
from support.fake_child import wait_until
from support.faulty import BREAK, breaking, end_of, hooked, in_threads, pid_of, use_fake_engine
from support.server_child import running as server

LIMIT_SECONDS = 0.6
DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
SHORT = Options(num_predict=3, temperature=0)
GUARDED = Timeouts(stall_seconds=LIMIT_SECONDS)

HANG = breaking("import threading; threading.Event().wait()")

SLOW_STEPS = """
import time
from support import fakes
at_once = fakes.FakeBatch.step
def slow(self):
    time.sleep(0.1)
    return at_once(self)
fakes.FakeBatch.step = slow
"""
"""Eight tokens of a prompt, or one generated token, in a tenth of a second."""


def status(age: float | None, steps: int, state: pb.State.ValueType = pb.STATE_ACTIVE) -> Status:
    made = status_of(pb.StatusResponse(state=state, step_count=steps, running_count=1))
    return dataclasses.replace(made, last_progress_age_seconds=age)


def test_it_acts_when_work_is_active_and_nothing_moves() -> None:
    watch = StallDetector(10.0)
    assert watch.observe(status(9.9, steps=5)) is None
    assert watch.observe(status(12.0, steps=5)) is None
    stall = watch.observe(status(14.5, steps=5))
    assert stall is not None
    assert "14.5 s" in stall


def test_it_never_acts_without_work() -> None:
    watch = StallDetector(10.0)
    for _ in range(100):
        assert watch.observe(status(None, steps=5)) is None


def test_it_never_acts_while_steps_are_made() -> None:
    """Each of them as slow as the limit and slower."""
    watch = StallDetector(10.0)
    for steps in range(100):
        assert watch.observe(status(15.0, steps)) is None


def test_one_look_is_no_proof() -> None:
    """A process that was stopped in a debugger and goes on looks like this once."""
    watch = StallDetector(10.0)
    assert watch.observe(status(3600.0, steps=5)) is None
    assert watch.observe(status(0.1, steps=6)) is None
    assert watch.observe(status(11.0, steps=6)) is None


@pytest.mark.parametrize(
    "state", [pb.STATE_LOADING, pb.STATE_STOPPING, pb.STATE_FAILED, pb.STATE_IDLE]
)
def test_it_leaves_all_but_completions_to_others(state: pb.State.ValueType) -> None:
    watch = StallDetector(10.0)
    for _ in range(5):
        assert watch.observe(status(999.0, 5, state)) is None


def test_a_stuck_step_ends_the_child_in_words(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_engine(monkeypatch, HANG)
    with RunnerProcess(stub, timeouts=GUARDED) as runner, in_threads(1) as pool:
        began = time.monotonic()
        call = pool.submit(end_of, lambda: runner.complete("x", options=SHORT, request_id=BREAK))
        ages: list[float] = []
        while len(ages) < 3:
            age = runner.status().last_progress_age_seconds
            if age is not None and (not ages or age > ages[-1]):
                ages.append(age)
        error = call.result(20)
        took = time.monotonic() - began
    assert isinstance(error, errors.RunnerExitedError)
    assert LIMIT_SECONDS < took < 3 * LIMIT_SECONDS
    assert error.exit_code == -signal.SIGKILL
    assert "by this client: its engine had 1 completions and had not moved for" in str(error)
    assert "OOM" not in str(error)


async def test_the_same_in_asyncio(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_engine(monkeypatch, HANG)
    async with AsyncRunnerProcess(stub, timeouts=GUARDED) as runner:
        with pytest.raises(errors.RunnerExitedError, match="had not moved for"):
            async with asyncio.timeout(20):
                await runner.complete("x", options=SHORT, request_id=BREAK)


@pytest.mark.mlx
def test_a_stuck_step_of_mlx_too(model: str, tmp_path: Path) -> None:
    env = hooked(tmp_path, HANG)
    with RunnerProcess(model, env=env, timeouts=GUARDED) as runner:
        assert runner.complete("def", options=SHORT).content
        began = time.monotonic()
        with pytest.raises(errors.RunnerExitedError, match="had not moved for"):
            runner.complete("def", options=SHORT, request_id=BREAK)
        assert time.monotonic() - began < 3 * LIMIT_SECONDS
        runner.restart()
        assert runner.complete("def", options=SHORT).content


def test_a_slow_prompt_and_slow_tokens_are_let_go_on(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes longer than the limit, and moves."""
    use_fake_engine(monkeypatch, SLOW_STEPS)
    with RunnerProcess(stub, context_length=128, timeouts=GUARDED) as runner:
        began = time.monotonic()
        done = runner.complete("p" * 80, options=Options(num_predict=10))
        assert done.eval_count == 10
        assert done.prompt_eval_seconds > LIMIT_SECONDS
        assert time.monotonic() - began > 3 * LIMIT_SECONDS
        assert not runner.has_exited


def test_a_child_without_work_is_let_be(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_engine(monkeypatch)
    with RunnerProcess(stub, timeouts=Timeouts(stall_seconds=0.2)) as runner:
        runner.complete("x", options=SHORT)
        idle_since = runner.status().uptime_seconds
        while runner.status().uptime_seconds < idle_since + 0.7:
            assert not runner.has_exited
        assert runner.complete("x", options=SHORT).eval_count == 3


def test_a_child_that_was_stopped_and_goes_on_is_let_be(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_engine(monkeypatch, SLOW_STEPS)
    with RunnerProcess(stub, timeouts=GUARDED) as runner, in_threads(1) as pool:
        call = pool.submit(runner.complete, "x", options=Options(num_predict=12))
        wait_until(lambda: runner.status().running_count == 1)
        os.kill(pid_of(runner), signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: time.monotonic() - stopped > 2 * LIMIT_SECONDS)
        os.kill(pid_of(runner), signal.SIGCONT)
        assert call.result(20).eval_count == 12


def test_without_the_option_nobody_is_killed(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream's own limits end the wait; the child is left for its owner to judge."""
    use_fake_engine(monkeypatch, HANG)
    with RunnerProcess(stub, timeouts=Timeouts(first_token_seconds=0.5)) as runner:
        with pytest.raises(errors.RunnerTimeoutError) as caught:
            runner.complete("x", options=SHORT, request_id=BREAK)
        assert caught.value.phase == "first_token"
        status = runner.status()
        assert status.state is State.ACTIVE
        assert (status.last_progress_age_seconds or 0) > 0.4
        os.kill(pid_of(runner), signal.SIGKILL)


@pytest.mark.mlx
def test_a_server_notices_by_itself(tmp_path: Path) -> None:
    """Also one of MLX's own threads that hangs; the step waits for it inside C."""
    hang = breaking("import time\nwhile True: time.sleep(60)")
    with server(tmp_path, "--stall-seconds", "0.5", **hooked(tmp_path, hang)) as child:
        child.load(DEMO)
        request = pb.CompletionRequest(
            prompt="def", request_id=BREAK, options=pb.CompletionOptions(num_predict=5)
        )
        with pytest.raises(grpc.RpcError, match="stood still"):
            list(child.stub.Completion(request, timeout=30))
        assert child.wait() == 71
        assert "stood still" in child.log.read_text()
    assert "stood still" in exit_in_words(71)
