"""AsyncRunnerProcess with a fake runner as the child."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from runner_client import AsyncRunnerProcess, RestartPolicy, State, Status, Timeouts, errors
from support.fake_child import is_gone, use_fake_child, use_script, wait_until, write_model

SLOW_LOAD = "runner.load_seconds = 600"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "tiny"))


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch)


def kill(runner: AsyncRunnerProcess) -> None:
    assert runner.pid is not None
    os.kill(runner.pid, signal.SIGKILL)


@pytest.mark.usefixtures("fake_child")
async def test_the_arguments_of_completions_reach_the_child(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "runner_client")
    async with AsyncRunnerProcess(model) as runner:
        await runner.complete("Hi", request_id="one", priority=7)
        assert [chunk async for chunk in runner.completion("Hi", request_id="two", priority=-8)]
    # The child prints its requests when it stops.
    for request_id, priority in (("one", 7), ("two", -8)):
        assert f'request_id: "{request_id}"\\npriority: {priority}\\n' in caplog.text


@pytest.mark.usefixtures("fake_child")
async def test_the_context_manager_starts_and_stops_the_child(model: str) -> None:
    async with AsyncRunnerProcess(model) as runner:
        pid = runner.pid
        assert pid is not None
        assert runner.address == f"127.0.0.1:{runner.port}"
        assert runner.model_path == model
        assert (await runner.complete("Hi")).content == "Hello world"
        pieces = [chunk.content async for chunk in runner.completion("Hi")]
        assert pieces == ["Hello", " world", ""]
        assert await runner.detokenize(await runner.tokenize("h\u00e9")) == "h\u00e9"
        assert await runner.trim(prefix_cache_bytes=0) == 0
        assert await runner.ping() > 0
        assert (await runner.status()).pid == pid
        with pytest.raises(errors.NotSupportedError):
            await runner.embedding("x")
    assert runner.has_exited
    assert is_gone(pid)
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        await runner.status()


@pytest.mark.usefixtures("fake_child")
async def test_load_wait_and_close_can_be_called_separately(model: str) -> None:
    runner = AsyncRunnerProcess(model, context_length=64)
    try:
        assert (await runner.load()).context_length == 64
        results = await asyncio.gather(*(runner.wait_until_running() for _ in range(3)))
        assert {result.model.path for result in results} == {model}
        with pytest.raises(errors.RunnerUnavailableError, match="already started"):
            await runner.load()
        assert (await runner.complete("Hi")).content == "Hello world"
    finally:
        await runner.close()
        await runner.close()


async def test_calls_before_the_start_say_what_to_do(model: str) -> None:
    runner = AsyncRunnerProcess(model)
    with pytest.raises(errors.RunnerUnavailableError, match=r"call load\(\) first"):
        await runner.status()
    with pytest.raises(errors.RunnerUnavailableError, match=r"call load\(\) first"):
        runner.completion("Hi")
    await runner.close()


async def test_a_load_reports_its_progress(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch, "runner.load_seconds = 1.0")
    seen: list[Status] = []
    runner = AsyncRunnerProcess(model)
    try:
        await runner.load()
        await runner.wait_until_running(seen.append)
    finally:
        await runner.close()
    assert State.LOADING in {status.state for status in seen}


async def test_a_stalled_load_times_out(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch, "runner.load_seconds = math.inf")
    runner = AsyncRunnerProcess(model, timeouts=Timeouts(load_seconds=0.5))
    with pytest.raises(errors.RunnerTimeoutError, match="no progress"):
        await runner.__aenter__()
    assert runner.has_exited


async def test_a_failing_load_ends_the_child(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch, "runner.failure = Failure('MODEL_UNSUPPORTED', 'no such layer')")
    runner = AsyncRunnerProcess(model)
    with pytest.raises(errors.ModelUnsupportedError, match="no such layer"):
        await runner.__aenter__()
    assert runner.has_exited


async def test_a_killed_child_ends_every_pending_call(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, "runner.stall_after = 1\nprint('last words', file=sys.stderr)")
    async with AsyncRunnerProcess(model) as runner:
        streams = [runner.completion("Hi") for _ in range(4)]
        for stream in streams:
            await anext(stream)
        tasks = [asyncio.create_task(anext(stream)) for stream in streams]
        begin = time.monotonic()
        kill(runner)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - begin < 1
        assert [type(end) for end in ends] == [errors.RunnerExitedError] * 4
        assert "killed by SIGKILL (signal 9)" in str(ends[0])
        assert "last words" in str(ends[0])
        with pytest.raises(errors.RunnerExitedError):
            await runner.status()


async def test_a_child_that_dies_while_loading_is_reported_at_once(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, SLOW_LOAD)
    runner = AsyncRunnerProcess(model)
    await runner.load()
    asyncio.get_running_loop().call_later(0.3, kill, runner)
    begin = time.monotonic()
    with pytest.raises(errors.RunnerExitedError, match="SIGKILL"):
        await runner.wait_until_running()
    assert time.monotonic() - begin < 0.3 + 1
    await runner.close()


async def test_an_exit_before_the_ready_line_is_reported(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, "import sys; sys.exit('no such device')")
    runner = AsyncRunnerProcess(model)
    with pytest.raises(errors.RunnerExitedError, match="no such device"):
        await runner.load()
    assert runner.has_exited


async def test_a_ready_child_that_does_not_serve_times_out(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = "print('1|1|tcp|127.0.0.1:1|grpc', flush=True); import time; time.sleep(600)"
    use_script(monkeypatch, ready)
    runner = AsyncRunnerProcess(model, timeouts=Timeouts(start_seconds=4))
    with pytest.raises(errors.RunnerTimeoutError, match="did not report SERVING"):
        await runner.load()
    assert runner.has_exited


async def test_cancelling_the_start_ends_the_child(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, "import time; time.sleep(600)")
    runner = AsyncRunnerProcess(model)
    task = asyncio.create_task(runner.load())
    await asyncio.to_thread(wait_until, lambda: runner.pid is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runner.has_exited


async def test_cancelling_the_load_ends_the_child(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, SLOW_LOAD)
    runner = AsyncRunnerProcess(model)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0), runner:
            pytest.fail("the load takes longer")
    assert runner.has_exited


async def test_a_cancelled_wait_can_be_repeated(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, "runner.load_seconds = 1.0")
    runner = AsyncRunnerProcess(model)
    try:
        await runner.load()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await runner.wait_until_running()
        assert (await runner.wait_until_running()).model.path == model
    finally:
        await runner.close()


async def test_close_from_another_task_ends_a_load(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, SLOW_LOAD)
    runner = AsyncRunnerProcess(model)
    await runner.load()
    waiting = asyncio.create_task(runner.wait_until_running())
    await asyncio.sleep(0)
    await runner.close()
    with pytest.raises(errors.RunnerError):
        await waiting
    assert runner.has_exited


async def test_cancelling_the_close_kills_and_reaps(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rude = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    use_fake_child(monkeypatch, rude)
    runner = AsyncRunnerProcess(model, timeouts=Timeouts(close_seconds=60))
    await runner.load()
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await runner.close()
    assert runner.has_exited
    assert time.monotonic() - begin < 5


@pytest.mark.usefixtures("fake_child")
async def test_a_process_has_a_client_for_every_call(model: str) -> None:
    runner = AsyncRunnerProcess(model)
    with pytest.raises(errors.RunnerUnavailableError, match=r"call load\(\) first"):
        _ = runner.client
    async with runner:
        first = runner.client
        assert first is runner.client
        assert (await first.complete("Hi")).content == "Hello world"
        assert (await first.unload()) == 0
        assert (await first.load(model)).model.path == model
        await runner.restart()
        assert runner.client is not first
        assert (await runner.client.status()).pid == runner.pid
        with pytest.raises(errors.RunnerUnavailableError):
            await first.status()


@pytest.mark.usefixtures("fake_child")
async def test_restart_starts_a_new_process(model: str) -> None:
    policy = RestartPolicy(max_restarts=1)
    async with AsyncRunnerProcess(model, restart_policy=policy) as runner:
        first = runner.pid
        kill(runner)
        with pytest.raises(errors.RunnerExitedError):
            await runner.complete("Hi")
        await runner.restart()
        assert runner.pid != first
        assert (await runner.complete("Hi")).content == "Hello world"
        with pytest.raises(errors.RunnerUnavailableError, match="restarted 1 times"):
            await runner.restart()


def test_a_child_may_die_after_its_event_loop_has_closed(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch)
    runner = AsyncRunnerProcess(model)

    async def start() -> None:
        await runner.load()
        await runner.wait_until_running()

    asyncio.run(start())
    kill(runner)
    wait_until(lambda: runner.has_exited)
    gc.collect()


@pytest.mark.usefixtures("fake_child")
async def test_calls_on_a_child_that_died_before_the_close_raise_its_exit_error(
    model: str,
) -> None:
    async with AsyncRunnerProcess(model) as runner:
        kill(runner)
        await asyncio.to_thread(wait_until, lambda: runner.has_exited)
        await runner.close()
        with pytest.raises(errors.RunnerExitedError, match="SIGKILL"):
            await runner.status()
