"""Spare processes of pools in real child processes, with fake runners."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from runner_client import (
    AsyncRunnerPool,
    MemoryGate,
    ModelState,
    PoolSettings,
    RestartPolicy,
    RunnerPool,
)
from runner_client.memory.estimation import BARE_PROCESS_BYTES
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.reservations import ReservationBook
from support.fake_child import is_gone, open_files, use_fake_child, wait_until, write_model
from support.pool_machine import eventually, state_of, use

GIB = 2**30
PROMISED_SECONDS, SLACK_SECONDS = 2.0, 1.0
"""Longest time that a runner outlives its parent, and the scheduling of a busy machine."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    use_fake_child(monkeypatch)
    return str(write_model(tmp_path / "a"))


def gate() -> MemoryGate:
    """Return a gate of a machine with constant free memory."""
    free = FreeMemory(100 * GIB, "system", 100 * GIB, None, None, "test", "cpu")
    return MemoryGate(measure=lambda: free, settle_seconds=0)


def new_pool(count: int = 1, policy: RestartPolicy | None = None) -> AsyncRunnerPool:
    """Return a pool with spare processes."""
    settings = PoolSettings(min_residence_seconds=0.0, return_seconds=0.0, spare_processes=count)
    return AsyncRunnerPool(settings, gate=gate(), restart_policy=policy)


async def spare_pids(
    pool: AsyncRunnerPool, count: int = 1, *, other_than: int | None = None
) -> list[int]:
    """Wait until so many spare processes are ready; return their process ids."""

    def pids() -> list[int]:
        return [process.pid for process in pool._manager.spares.processes if process.pid]

    await eventually(lambda: pool.status().spare_count == count and other_than not in pids())
    return pids()


async def test_a_load_takes_the_process_that_runs_already(model: str) -> None:
    async with new_pool() as pool:
        (pid,) = await spare_pids(pool)
        assert await use(pool, model) == pid
        (other,) = await spare_pids(pool)
        with ReservationBook().locked() as view:
            needs = {each.pid: each.need_bytes for each in view.records()}
        held = pool.status().models[0].held_bytes
        assert needs == {pid: held, other: BARE_PROCESS_BYTES}
        async with pool.runner(model) as runner:
            assert (await runner.complete("Hi")).content == "Hello world"


async def test_a_changed_environment_does_not_take_it(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with new_pool() as pool:
        (pid,) = await spare_pids(pool)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert await use(pool, model) != pid
        assert is_gone(pid)
        # The next one has the new environment.
        (pid,) = await spare_pids(pool)
        await pool.evict(model)
        assert await use(pool, model) == pid


async def test_a_killed_one_is_reaped_and_replaced(model: str) -> None:
    async with new_pool(policy=RestartPolicy(max_restarts=1)) as pool:
        (first,) = await spare_pids(pool)
        os.kill(first, signal.SIGKILL)
        (second,) = await spare_pids(pool, other_than=first)
        assert not psutil.pid_exists(first)
        os.kill(second, signal.SIGKILL)
        # The restart policy allows no third one, and the pool works without.
        await eventually(lambda: pool.status().spare_bytes == 0)
        assert await use(pool, model)
        assert len(psutil.Process().children()) == 1


async def test_a_hanging_one_delays_no_load_for_long(model: str) -> None:
    async with new_pool() as pool:
        (pid,) = await spare_pids(pool)
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(10.0):
            assert await use(pool, model) != pid
        assert is_gone(pid)


async def test_they_end_with_the_pool_without_a_trace(model: str) -> None:
    async def use_pool() -> None:
        async with new_pool(2) as pool:
            pids = await spare_pids(pool, 2)
            await use(pool, model)
            await spare_pids(pool, 2)
        assert all(map(is_gone, pids))
        assert not psutil.Process().children()

    await use_pool()
    before = open_files()
    await use_pool()
    await eventually(lambda: open_files() <= before)


async def test_a_close_that_is_cancelled_kills_them(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del model
    use_fake_child(monkeypatch, "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    async with new_pool() as pool:
        (pid,) = await spare_pids(pool)
        closing = asyncio.create_task(pool.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert is_gone(pid)


def test_the_sync_pool_has_them_too(model: str) -> None:
    settings = PoolSettings(min_residence_seconds=0.0, return_seconds=0.0, spare_processes=1)
    with RunnerPool(settings, gate=gate()) as pool:
        wait_until(lambda: pool.status().spare_count == 1)
        (child,) = psutil.Process().children()
        with pool.runner(model) as runner:
            assert runner.complete("Hi").content == "Hello world"
            (loaded,) = pool.models()
            assert (loaded.pid, loaded.state) == (child.pid, ModelState.READY)
        wait_until(lambda: pool.status().spare_count == 1)


_PROGRAM = """
import sys, time
from runner_client import PoolSettings, RunnerPool

with RunnerPool(PoolSettings(spare_processes=1)) as pool:
    while not pool.status().spare_count:
        time.sleep(0.01)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.mlx
@pytest.mark.slow
def test_they_end_with_a_killed_program() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        (spare,) = psutil.Process(program.pid).children()
        program.kill()
        wait_until(lambda: is_gone(spare.pid), PROMISED_SECONDS + SLACK_SECONDS)


async def test_under_a_budget_for_two_models_both_stay(model: str, tmp_path: Path) -> None:
    other = str(write_model(tmp_path / "b"))
    async with new_pool() as pool:
        need = sum((await pool.know(model)).parts.values())
    settings = PoolSettings(
        budget_bytes=2 * need,
        min_residence_seconds=0.0,
        return_seconds=0.0,
        spare_processes=2,
    )
    async with AsyncRunnerPool(settings, gate=gate()) as pool:
        await spare_pids(pool, 2)
        await use(pool, model)
        await spare_pids(pool, 2)
        # One spare process is for the load, and the other one has to go.
        await use(pool, other)
        assert [state_of(pool, each) for each in (model, other)] == [ModelState.READY] * 2
        assert pool.status().held_bytes <= 2 * need
        assert len(psutil.Process().children()) == 2
