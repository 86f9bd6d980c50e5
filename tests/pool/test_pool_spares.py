"""Spare processes on a machine in memory: starts, loads, deaths, pressure, close."""

from __future__ import annotations

import asyncio

import pytest

from runner_client import (
    AsyncRunnerPool,
    InsufficientMemoryError,
    ModelState,
    RestartPolicy,
    RunnerUnavailableError,
    errors,
)
from runner_client.memory.estimation import BARE_PROCESS_BYTES
from runner_client.pool import aio_pressure
from runner_client.pool.scheduling import spares
from support.pool_machine import ONE, Machine, eventually, state_of, use

RESERVE = 2**30


async def ready(pool: AsyncRunnerPool, count: int = 1) -> None:
    """Wait until so many spare processes have started."""
    await eventually(lambda: pool.status().spare_count == count)


async def started(pool: AsyncRunnerPool, machine: Machine, count: int) -> None:
    """Wait until a number of spare processes were created and the last one is ready."""
    await eventually(lambda: (len(machine.spares), pool.status().spare_count) == (count, 1))


async def test_a_pool_has_none_unless_the_settings_say_so(machine: Machine) -> None:
    async with machine.pool() as pool:
        await use(pool, machine.model("a"))
        assert (pool.status().spare_count, pool.status().spare_bytes) == (0, 0)
    assert machine.spares == []


async def test_a_load_takes_the_spare_process_and_another_is_started(machine: Machine) -> None:
    async with machine.pool(spare_processes=1) as pool:
        await ready(pool)
        status = pool.status()
        assert status.held_bytes == status.spare_bytes == BARE_PROCESS_BYTES
        pid = machine.spares[0].pid
        assert await use(pool, machine.model("a")) == pid
        await ready(pool)
        assert len(machine.spares) == len(machine.processes) == 2
        status = pool.status()
        assert status.held_bytes == status.models[0].held_bytes + BARE_PROCESS_BYTES


async def test_a_load_waits_for_a_spare_process_that_is_starting(machine: Machine) -> None:
    machine.spare.may_load.clear()
    async with machine.pool(spare_processes=1) as pool:
        await eventually(lambda: len(machine.spares) == 1)
        loading = asyncio.create_task(pool.load(machine.model("a")))
        await eventually(lambda: state_of(pool, machine.model("a")) is ModelState.LOADING)
        machine.spare.may_load.set()
        assert (await loading).pid == machine.spares[0].pid
        assert machine.runners(machine.model("a")) == machine.spares[:1]


async def test_a_start_that_fails_does_not_fail_the_load_that_took_it(machine: Machine) -> None:
    machine.spare.may_load.clear()
    machine.spare.loads.append(RunnerUnavailableError("no interpreter"))
    async with machine.pool(spare_processes=1) as pool:
        await eventually(lambda: len(machine.spares) == 1)
        loading = asyncio.create_task(pool.load(machine.model("a")))
        await eventually(lambda: state_of(pool, machine.model("a")) is ModelState.LOADING)
        machine.spare.may_load.set()
        assert (await loading).state is ModelState.READY
        await started(pool, machine, 2)


async def test_a_budget_for_one_model_loads_it_beside_no_spare_process(machine: Machine) -> None:
    async with machine.pool(spare_processes=2, budget_bytes=ONE) as pool:
        await ready(pool, 2)
        await pool.load(machine.model("a"), evict=False)
        assert pool.status().held_bytes <= ONE
        # The next load needs the memory of the first model, and there is no room beside it.
        await use(pool, machine.model("b"))
        assert pool.status().held_bytes <= ONE
        assert pool.status().spare_count == 0


async def test_spare_processes_go_before_a_model(machine: Machine) -> None:
    need = 224 * 2**20
    budget = 2 * need + 2**20
    async with machine.pool(spare_processes=2, budget_bytes=budget) as pool:
        await ready(pool, 2)
        await use(pool, machine.model("a"))
        await ready(pool, 2)
        await use(pool, machine.model("b"))
        assert state_of(pool, machine.model("a")) is ModelState.READY
        assert sum(each.is_running for each in machine.processes) == 2


async def test_one_that_dies_is_replaced_within_the_restart_policy(machine: Machine) -> None:
    policy = RestartPolicy(max_restarts=2, window_seconds=600.0)
    async with machine.pool(spare_processes=1, policy=policy) as pool:
        for count in range(1, 4):
            await started(pool, machine, count)
            machine.spares[-1].die()
        await eventually(lambda: pool.status().spare_count == 0)
        await use(pool, machine.model("a"))
        await asyncio.sleep(0.1)
        assert len(machine.spares) == 3
        assert pool.status().spare_bytes == 0


async def test_one_that_died_is_started_again_after_the_window(machine: Machine) -> None:
    policy = RestartPolicy(max_restarts=0, window_seconds=0.2)
    async with machine.pool(spare_processes=1, policy=policy) as pool:
        await started(pool, machine, 1)
        machine.spares[-1].die()
        await started(pool, machine, 2)


async def test_starts_that_fail_end_by_the_restart_policy(machine: Machine) -> None:
    machine.spare.loads.extend([RunnerUnavailableError("no interpreter")] * 9)
    policy = RestartPolicy(max_restarts=2, window_seconds=600.0)
    async with machine.pool(spare_processes=1, policy=policy) as pool:
        await eventually(lambda: len(machine.spares) == 3)
        assert (await pool.load(machine.model("a"))).state is ModelState.READY
        await asyncio.sleep(0.1)
        assert len(machine.spares) == 3


async def test_a_refused_start_is_tried_again_after_a_pause(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner_client.pool.aio_spares.PAUSE_SECONDS", 0.2)
    refusal = InsufficientMemoryError("taken", required_bytes=1, available_bytes=0)
    machine.spare.loads.extend([refusal] * 2)
    policy = RestartPolicy(max_restarts=0)
    async with machine.pool(spare_processes=1, policy=policy) as pool:
        await ready(pool)
        assert len(machine.spares) == 3


async def test_under_pressure_they_go_first_and_stay_away(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio_pressure, "_CPU_SECONDS", 0.02)
    monkeypatch.setattr(spares, "PAUSE_SECONDS", 0.1)
    machine.total_bytes = 2 * RESERVE
    async with machine.pool(spare_processes=1, reserve_bytes=RESERVE, return_seconds=0.1) as pool:
        await use(pool, machine.model("a"))
        runner = machine.processes[0]
        runner.cache_bytes = 2**20
        await ready(pool)
        free = machine.total_bytes - machine.held_bytes
        machine.outside_bytes = free - RESERVE + 2**20
        await eventually(lambda: pool.status().spare_bytes == 0)
        count = len(machine.spares)
        # The spare process was enough, and a new one would leave less than the reserve.
        await asyncio.sleep(0.5)
        assert len(machine.spares) == count
        assert runner.trims == 0
        assert state_of(pool, machine.model("a")) is ModelState.READY
        machine.outside_bytes = 0
        await ready(pool)


async def test_no_refusal_counts_the_memory_of_spare_processes(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        need = (await pool.know(model)).parts
    machine.total_bytes = sum(need.values())
    async with machine.pool(spare_processes=2, return_seconds=0.1) as pool:
        await ready(pool, 2)
        await pool.load(model, evict=False)
        assert len(machine.processes) == 2


async def test_a_load_does_not_wait_for_needless_memory_of_spare_processes(
    machine: Machine,
) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        need = sum((await pool.know(model)).parts.values())
    settings = {"spare_processes": 2, "return_seconds": 1000}
    async with asyncio.timeout(30), machine.pool(budget_bytes=need, **settings) as pool:
        await ready(pool, 2)
        machine.spare.may_stop.clear()
        loading = asyncio.create_task(pool.load(model))
        await eventually(lambda: any(each.is_stopping for each in machine.spares))
        machine.outside_bytes = machine.held_bytes
        machine.spare.may_stop.set()
        await loading


@pytest.mark.parametrize("is_starting", [False, True])
async def test_a_close_leaves_none(machine: Machine, is_starting: bool) -> None:
    if is_starting:
        machine.spare.may_load.clear()
    async with machine.pool(spare_processes=2):
        await eventually(lambda: sum(each.is_running for each in machine.spares) == 2)
    assert not any(each.is_running for each in machine.spares)


async def test_a_measurement_that_ends_during_the_close_starts_none(machine: Machine) -> None:
    measuring, may_end = asyncio.Event(), asyncio.Event()

    async def measure() -> tuple[int, int]:
        measuring.set()
        await may_end.wait()
        return machine.total_bytes, 0

    async with machine.pool(spare_processes=1) as pool:
        pool._manager._measure = measure  # type: ignore[method-assign]
        await measuring.wait()
        # The close begins before the pool's own task runs again.
        may_end.set()
    assert machine.spares == []


async def test_a_load_that_fails_ends_its_spare_process(machine: Machine) -> None:
    model = machine.model("a")
    machine.of(model).loads.append(errors.ModelUnsupportedError("no such layer", model=model))
    async with machine.pool(spare_processes=1) as pool:
        await ready(pool)
        with pytest.raises(errors.ModelUnsupportedError):
            await pool.load(model)
        assert not machine.spares[0].is_running
        await ready(pool)
