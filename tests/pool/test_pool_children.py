"""Pools with fake runners in real child processes: deaths, descriptors, interrupts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from runner_client import (
    AsyncRunnerPool,
    LoadOptions,
    MemoryGate,
    ModelSettings,
    ModelState,
    PoolSettings,
    RunnerPool,
    RunnerProcess,
    Timeouts,
    errors,
)
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.reservations import ReservationBook
from support.fake_child import (
    is_gone,
    open_files,
    use_fake_child,
    use_script,
    wait_until,
    write_model,
)
from support.pool_machine import eventually, model_of, state_of, use

GIB = 2**30
SOON_SECONDS = 5.0


def free(available_bytes: int = 100 * GIB) -> FreeMemory:
    """Return a measurement of this much free memory."""
    return FreeMemory(available_bytes, "system", available_bytes, None, None, "test", "cpu")


def new_pool(**settings: float) -> AsyncRunnerPool:
    """Return a pool on a machine with memory that nothing takes."""
    # What exited runners held does not come back in this measurement.
    given = PoolSettings(min_residence_seconds=0.0, return_seconds=0.0, **settings)  # type: ignore[arg-type]
    return AsyncRunnerPool(given, gate=MemoryGate(measure=free, settle_seconds=0))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    use_fake_child(monkeypatch)
    return str(write_model(tmp_path / "a"))


@pytest.fixture
def slow_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model whose load does not end, with a completion that does not end either."""
    use_fake_child(monkeypatch, "runner.load_seconds = 600")
    return str(write_model(tmp_path / "a"))


def pid_of(pool: AsyncRunnerPool, model: str) -> int:
    """Return the process id of a model's runner."""
    pid = model_of(pool, model).pid
    assert pid is not None
    return pid


async def test_a_killed_runner_ends_its_calls_at_once(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, "runner.stall_after = 1")
    async with new_pool() as pool:
        async with pool.runner(model) as runner:
            stream = runner.completion("Hi")
            await anext(stream)
            reading = asyncio.create_task(anext(stream))
            pid = pid_of(pool, model)
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(SOON_SECONDS):
                with pytest.raises(errors.RunnerExitedError, match="SIGKILL"):
                    await reading
                with pytest.raises(errors.RunnerExitedError, match="SIGKILL"):
                    await runner.status()
            async with pool.runner(model) as replaced:
                assert (await replaced.status()).pid == pid_of(pool, model) != pid
        # The lease of the dead runner does not count for the new one.
        assert model_of(pool, model).leases == 0


async def test_a_runner_killed_while_idle_is_replaced(model: str) -> None:
    async with new_pool() as pool:
        await pool.load(model)
        pid = pid_of(pool, model)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: state_of(pool, model) is ModelState.ABSENT)
        assert pool.status().held_bytes == 0
        assert "killed by SIGKILL" in model_of(pool, model).last_error
        assert await use(pool, model) != pid


@pytest.mark.parametrize("is_ready", [False, True])
async def test_a_runner_killed_during_its_load_fails_all_that_wait(
    slow_model: str, is_ready: bool
) -> None:
    async with new_pool() as pool:
        waiting = [asyncio.create_task(use(pool, slow_model)) for _ in range(3)]
        await eventually(lambda: bool(child_of(pool, slow_model)))
        member = pool._manager.entries[slow_model].member
        assert member is not None
        await eventually(lambda: not is_ready or member.process.address is not None)
        os.kill(child_of(pool, slow_model), signal.SIGKILL)
        async with asyncio.timeout(SOON_SECONDS):
            ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [errors.RunnerExitedError] * 3


def child_of(pool: AsyncRunnerPool, model: str) -> int:
    """Return the process id of a runner, 0 if there is none."""
    found = pool.status().model(model)
    return (found.pid or 0) if found else 0


async def test_a_load_that_the_runner_refuses_is_a_typed_error(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, "runner.failure = Failure('MODEL_UNSUPPORTED', 'no such layer')")
    async with new_pool() as pool:
        with pytest.raises(errors.ModelUnsupportedError, match="no such layer"):
            await pool.load(model)
        assert pool.status().held_bytes == 0


async def test_the_gate_refuses_after_another_scheduler_took_the_memory(
    model: str,
) -> None:
    """The pool measures enough, and then another process reserves it."""
    need = 224 * 2**20
    gate = MemoryGate(measure=lambda: free(2 * need), settle_seconds=0, minimum_bytes=0)
    settings = PoolSettings(return_seconds=0.0)
    book = ReservationBook()
    async with AsyncRunnerPool(settings, gate=gate) as pool:
        loading = asyncio.create_task(pool.load(model))
        with book.locked() as view:
            other = view.add(2 * need, "another's")
        try:
            with pytest.raises(errors.InsufficientMemoryError, match="machine could give"):
                await loading
        finally:
            other.release()
        assert (await pool.load(model)).state is ModelState.READY


async def test_a_hanging_runner_is_evicted_soon(model: str) -> None:
    settings = PoolSettings(return_seconds=0.0)
    gate = MemoryGate(measure=free, settle_seconds=0)
    timeouts = Timeouts(close_seconds=0.5)
    async with AsyncRunnerPool(settings, gate=gate, timeouts=timeouts) as pool:
        await pool.load(model)
        pid = pid_of(pool, model)
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(2 * SOON_SECONDS):
            await pool.evict(model)
        assert is_gone(pid)


async def test_an_eviction_says_what_the_process_held(model: str) -> None:
    async with new_pool() as pool:
        await pool.load(model)
        returned = await pool.evict(model)
        assert 2**20 < returned.held_bytes < GIB
        assert str(returned).startswith("0 B of the ")


async def test_a_close_in_the_middle_of_a_start_leaves_no_child(slow_model: str) -> None:
    before = set(psutil.Process().children())
    for seconds in (0.0, 0.05, 0.3):
        async with new_pool() as pool:
            loading = asyncio.create_task(pool.load(slow_model))
            await asyncio.sleep(seconds)
        with pytest.raises(errors.RunnerUnavailableError):
            await loading
        assert set(psutil.Process().children()) <= before


async def test_a_close_that_is_cancelled_at_once_kills_the_runner(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_child(monkeypatch, "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    async with new_pool() as pool:
        await pool.load(model)
        pid = pid_of(pool, model)
        closing = asyncio.create_task(pool.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing], timeout=SOON_SECONDS)
        assert closing.cancelled()
        assert is_gone(pid)


async def test_starts_that_hang_delay_no_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, "import time; time.sleep(600)")
    models = [str(write_model(tmp_path / name)) for name in "ab"]
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with new_pool() as pool:
        loading = [asyncio.create_task(pool.load(model)) for model in models]
        await eventually(lambda: all(child_of(pool, model) for model in models))
        async with asyncio.timeout(2 * SOON_SECONDS):
            await pool.close()
        await asyncio.gather(*loading, return_exceptions=True)


def test_sync_clients_of_a_runner_are_closed_with_it(model: str) -> None:
    def use_pool() -> None:
        settings = PoolSettings(min_residence_seconds=0.0, return_seconds=0.0)
        gate = MemoryGate(measure=free, settle_seconds=0)
        with RunnerPool(settings, gate=gate) as pool:
            with pool.runner(model) as client, pool.runner(model) as same:
                assert client is same
                assert client.complete("Hi").content == "Hello world"
                os.kill(pool.models()[0].pid or 0, signal.SIGKILL)
                with pytest.raises(errors.RunnerExitedError, match="SIGKILL"):
                    wait_until(lambda: not client.status().pid)
            with pool.runner(model) as other:
                assert other.complete("Hi").content == "Hello world"
                assert other is not client

    use_pool()
    before = open_files()
    use_pool()
    wait_until(lambda: open_files() <= before)


@pytest.mark.slow
async def test_an_asyncio_pool_leaves_no_descriptor(model: str) -> None:
    async def use_pool() -> None:
        async with new_pool() as pool:
            await use(pool, model)
            await pool.evict(model)
            await use(pool, model)

    await use_pool()
    before = open_files()
    await use_pool()
    await eventually(lambda: open_files() <= before)


_PROGRAM = """
import sys
from runner_client import PoolSettings, RunnerPool

with RunnerPool(PoolSettings()) as pool:
    if sys.argv[2] == "leased":
        with pool.runner(sys.argv[1]):
            print(pool.models()[0].pid, flush=True)
            sys.stdin.read()
    else:
        pool.load(sys.argv[1], on_progress=lambda model: print(model.pid, flush=True))
        # A load may end before it has reported the process.
        print(pool.models()[0].pid, flush=True)
        sys.stdin.read()
"""


@pytest.mark.mlx
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["leased", "loading"])
def test_ctrl_c_ends_a_program_and_its_runners(moment: str) -> None:
    from runner_client.cli.demo import demo_model

    arguments = [sys.executable, "-c", _PROGRAM, str(demo_model()), moment]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        pid = ""
        while not pid.isdigit():
            pid = program.stdout.readline().strip()
            assert program.poll() is None
        os.killpg(program.pid, signal.SIGINT)
        _, err = program.communicate(timeout=60)
    assert program.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert is_gone(int(pid))


@pytest.mark.slow
async def test_two_pools_and_a_runner_share_the_machine(model: str, tmp_path: Path) -> None:
    """One machine with memory for two runners."""
    need = 224 * 2**20
    other = str(write_model(tmp_path / "b"))
    gate = MemoryGate(measure=lambda: free(2 * need + 2**26), settle_seconds=0, minimum_bytes=0)
    settings = PoolSettings(
        return_seconds=0.0,
        default=ModelSettings(options=LoadOptions(prefix_cache_bytes=0)),
    )
    async with (
        AsyncRunnerPool(settings, gate=gate) as first,
        AsyncRunnerPool(settings, gate=gate) as second,
    ):
        await asyncio.gather(first.load(model), second.load(other))
        loaded = [state_of(first, model), state_of(second, other)]
        assert loaded == [ModelState.READY] * 2
        with pytest.raises(errors.InsufficientMemoryError):
            await asyncio.to_thread(RunnerProcess(model, gate=gate).load)
        await first.evict(model)
        with RunnerProcess(model, gate=gate, prefix_cache_bytes=0) as runner:
            assert runner.pid
            with pytest.raises(errors.InsufficientMemoryError, match="machine could give"):
                await first.load(model)
        assert (await first.load(model)).state is ModelState.READY
