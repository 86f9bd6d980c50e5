"""Fault 3: hanging steps, and slow work mistaken for a hang.

tests/server/test_status_while_blocked.py shows that Status answers meanwhile, with the age of the
current work rather than of an idle hour. Here: the watchdogs of the client and the server.
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
from runner_client.rpc.messages.responses import status as status_of
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
at_once = fakes.FakeExecutor.run
def slow(self, item):
    time.sleep(0.1)
    return at_once(self, item)
fakes.FakeExecutor.run = slow
"""
"""Makes a work item take 0.1 s: eight tokens of a prompt, or one generated token."""


def status(age: float | None, steps: int, state: pb.State.ValueType = pb.STATE_ACTIVE) -> Status:
    made = status_of(pb.StatusResponse(state=state, step_count=steps, running_count=1))
    return dataclasses.replace(made, last_progress_age_seconds=age)


def test_active_work_without_a_step_is_a_stall() -> None:
    watch = StallDetector(10.0)
    assert watch.observe(status(9.9, steps=5)) is None
    assert watch.observe(status(12.0, steps=5)) is None
    stall = watch.observe(status(14.5, steps=5))
    assert stall is not None
    assert "14.5 s" in stall


def test_an_engine_without_work_never_stalls() -> None:
    watch = StallDetector(10.0)
    for _ in range(100):
        assert watch.observe(status(None, steps=5)) is None


def test_slow_steps_are_never_a_stall() -> None:
    """Each step takes longer than the limit."""
    watch = StallDetector(10.0)
    for steps in range(100):
        assert watch.observe(status(15.0, steps)) is None


def test_a_single_old_status_is_not_a_stall() -> None:
    """A process continued in a debugger looks like this once."""
    watch = StallDetector(10.0)
    assert watch.observe(status(3600.0, steps=5)) is None
    assert watch.observe(status(0.1, steps=6)) is None
    assert watch.observe(status(11.0, steps=6)) is None


@pytest.mark.parametrize(
    "state", [pb.STATE_LOADING, pb.STATE_STOPPING, pb.STATE_FAILED, pb.STATE_IDLE]
)
def test_only_an_active_engine_can_stall(state: pb.State.ValueType) -> None:
    watch = StallDetector(10.0)
    for _ in range(5):
        assert watch.observe(status(999.0, 5, state)) is None


def test_a_stuck_step_ends_the_child_with_a_reason(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert "by this client: its engine had 1 completions and made no progress for" in str(error)
    assert "OOM" not in str(error)


async def test_a_stuck_step_ends_the_child_in_asyncio(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_engine(monkeypatch, HANG)
    async with AsyncRunnerProcess(stub, timeouts=GUARDED) as runner:
        with pytest.raises(errors.RunnerExitedError, match="made no progress for"):
            async with asyncio.timeout(20):
                await runner.complete("x", options=SHORT, request_id=BREAK)


@pytest.mark.mlx
def test_a_stuck_step_of_mlx_ends_the_child(model: str, tmp_path: Path) -> None:
    env = hooked(tmp_path, HANG)
    with RunnerProcess(model, env=env, timeouts=GUARDED) as runner:
        assert runner.complete("def", options=SHORT).content
        began = time.monotonic()
        with pytest.raises(errors.RunnerExitedError, match="made no progress for"):
            runner.complete("def", options=SHORT, request_id=BREAK)
        assert time.monotonic() - began < 3 * LIMIT_SECONDS
        runner.restart()
        assert runner.complete("def", options=SHORT).content


def test_a_slow_prompt_and_slow_tokens_do_not_end_the_child(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and decode each take longer than the limit, but keep making steps."""
    use_fake_engine(monkeypatch, SLOW_STEPS)
    with RunnerProcess(stub, context_length=128, timeouts=GUARDED) as runner:
        began = time.monotonic()
        done = runner.complete("p" * 80, options=Options(num_predict=10))
        assert done.eval_count == 10
        assert done.prompt_eval_seconds > LIMIT_SECONDS
        assert time.monotonic() - began > 3 * LIMIT_SECONDS
        assert not runner.has_exited


def test_an_idle_child_is_not_killed(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_engine(monkeypatch)
    with RunnerProcess(stub, timeouts=Timeouts(stall_seconds=0.2)) as runner:
        runner.complete("x", options=SHORT)
        idle_since = runner.status().uptime_seconds
        while runner.status().uptime_seconds < idle_since + 0.7:
            assert not runner.has_exited
        assert runner.complete("x", options=SHORT).eval_count == 3


def test_a_child_that_was_stopped_and_continued_is_not_killed(
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


def test_without_the_option_a_stuck_child_is_not_killed(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream's own limit ends the wait, and the child keeps running."""
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
def test_a_server_ends_after_its_own_stall(tmp_path: Path) -> None:
    """A hang in one of MLX's own threads looks the same: the step does not return."""
    hang = breaking("import time\nwhile True: time.sleep(60)")
    with server(tmp_path, "--stall-seconds", "0.5", **hooked(tmp_path, hang)) as child:
        child.load(DEMO)
        request = pb.CompletionRequest(
            prompt="def", request_id=BREAK, options=pb.CompletionOptions(num_predict=5)
        )
        with pytest.raises(grpc.RpcError, match="made no progress"):
            list(child.stub.Completion(request, timeout=30))
        assert child.wait() == 71
        assert "made no progress" in child.log.read_text()
    assert "stalled" in exit_in_words(71)
