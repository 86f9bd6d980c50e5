"""Fault 1: steps raising once, and twice in a row.

tests/server/test_failing_steps.py shows with a fake model library that the queue is served
afterwards and that two failures in a row end the process. Here: how long that takes, and the
same with MLX in a child and with the client's errors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner_client import Options, RunnerClient, RunnerProcess, State, Timeouts, errors
from support.fake_child import wait_until
from support.faulty import BREAK, breaking, end_of, hooked, in_threads
from support.harness import Problem, Server, eventually, failure, joined

PROMISED_SECONDS = 1.0
SHORT = Options(num_predict=4, temperature=0, logit_bias={0: -100})

RAISE = breaking("raise RuntimeError('broken on purpose')")
RAISE_IN_A_BATCH = breaking(
    """
    if len(self._scheduler.running) < 3 or len(self._scheduler.waiting) < 2:
        return run(self, item, executor)
    raise RuntimeError('broken on purpose')
    """
)
"""Raises once three streams run and two requests wait."""


async def test_a_failed_step_ends_its_streams_in_time_and_the_queue_is_served(
    server: Server,
) -> None:
    await server.load(parallel=3)
    gate = server.backend.step_gate
    gate.shut()
    streams = [server.start(f"stream {i}") for i in range(3)]
    await eventually(lambda: server.view.request_count == 3)
    gate.allow(4)
    await server.thread(lambda: gate.wait_passed(4))
    waiting = [server.start(f"waits {i}", num_predict=4) for i in range(2)]
    await eventually(lambda: server.view.request_count == 5)
    await server.thread(gate.wait_arrival)
    server.backend.failures.append(RuntimeError("broken on purpose"))
    began = time.monotonic()
    gate.open()
    ends = await asyncio.gather(*(failure(stream) for stream in streams))
    assert time.monotonic() - began < PROMISED_SECONDS
    assert [end.reason for end in ends] == ["GENERATION_FAILED"] * 3
    assert all(isinstance(end, Problem) for end in ends)
    for call in waiting:
        messages = [message async for message in call]
        assert messages[-1].eval_count == 4
        assert len(joined(messages)) == 4
    assert await server.health() == 1
    await server.assert_nothing_left()


@pytest.fixture(scope="module")
def breakable(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerProcess]:
    """Run a real runner whose step raises once the batch is full and two requests wait."""
    env = hooked(tmp_path_factory.mktemp("hook"), RAISE_IN_A_BATCH)
    with RunnerProcess(model, parallel=3, env=env) as runner:
        yield runner


@pytest.mark.mlx
def test_a_failed_step_of_mlx_ends_its_streams_in_time_and_the_queue_is_served(
    breakable: RunnerProcess,
) -> None:
    ends: list[float] = []

    def stream() -> Exception | None:
        options = Options(num_predict=4000, temperature=0, logit_bias={0: -100})
        error = end_of(lambda: breakable.complete("def", options=options, request_id=BREAK))
        ends.append(time.monotonic())
        return error

    with in_threads(5) as pool:
        streams = [pool.submit(stream) for _ in range(3)]
        _wait_until_running(breakable, running=3)
        waiting = [pool.submit(breakable.complete, f"def {i}", options=SHORT) for i in range(2)]
        failed = [call.result(30) for call in streams]
        assert [call.result(30).eval_count for call in waiting] == [4, 4]
    assert [type(error) for error in failed] == [errors.GenerationFailedError] * 3
    assert max(ends) - min(ends) < PROMISED_SECONDS
    status = breakable.status()
    assert status.state is State.ACTIVE
    assert "RuntimeError" in status.last_error
    assert breakable.complete("def", options=SHORT).eval_count == 4


def _wait_until_running(runner: RunnerProcess, running: int) -> None:
    deadline = time.monotonic() + 30
    while runner.status().running_count != running:
        assert time.monotonic() < deadline


@pytest.mark.mlx
def test_two_failed_steps_in_a_row_are_explained_by_the_client(model: str, tmp_path: Path) -> None:
    env = hooked(tmp_path, RAISE)
    with RunnerProcess(model, env=env, timeouts=Timeouts(close_seconds=20)) as runner:
        assert runner.address is not None
        first = end_of(lambda: runner.complete("def", options=SHORT, request_id=BREAK))
        second = end_of(lambda: runner.complete("def", options=SHORT, request_id=BREAK))
        began = time.monotonic()
        assert isinstance(first, errors.GenerationFailedError)
        assert isinstance(second, errors.GenerationFailedError)
        wait_until(lambda: runner.has_exited, 30)
        assert time.monotonic() - began < 2 * PROMISED_SECONDS
        assert runner.exit_code == 70
        with pytest.raises(errors.RunnerExitedError, match="exit code 70") as caught:
            runner.complete("def", options=SHORT)
        assert caught.value.exit_code == 70
        # The traceback of MLX's error, and the engine's last line.
        assert any("broken on purpose" in line for line in caught.value.stderr_tail)
        assert any("the engine is dead" in line for line in caught.value.stderr_tail)
        assert caught.value.__cause__ is not None
        with RunnerClient(runner.address) as other, pytest.raises(errors.RunnerUnavailableError):
            other.is_serving()
