"""Memory that other programs need: prefix caches go first, then idle models one by one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from runner_client import AsyncRunnerPool, ModelSettings, ModelState
from runner_client.pool import aio_pressure
from support.pool_machine import Machine, eventually, model_of, state_of, use

RESERVE = 2**30


@pytest.fixture(autouse=True)
def measured_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio_pressure, "_CPU_SECONDS", 0.02)


@contextlib.asynccontextmanager
async def loaded(machine: Machine, *names: str) -> AsyncIterator[tuple[AsyncRunnerPool, list[str]]]:
    """Open a pool with models loaded in this order, with prefix caches that hold something."""
    models = [machine.model(name) for name in names]
    pinned = {each: ModelSettings(pinned=True) for each in models if each.endswith("pinned")}
    async with machine.pool(reserve_bytes=RESERVE, models=pinned, return_seconds=0.1) as pool:
        for model in models:
            await use(pool, model)
            machine.runners(model)[0].cache_bytes = 2**20
        yield pool, models


def press(machine: Machine, missing_bytes: int) -> None:
    """Let others take memory, so that this much is missing from the reserve."""
    free = machine.total_bytes - machine.held_bytes
    machine.outside_bytes = free - RESERVE + missing_bytes


async def test_caches_go_first_and_then_idle_models_one_by_one(machine: Machine) -> None:
    async with loaded(machine, "a", "b", "c") as (pool, models):
        press(machine, 2**20)
        await eventually(lambda: all(each.trims for each in machine.processes))
        states = [state_of(pool, model) for model in models]
        assert states.count(ModelState.READY) == 3
        # The caches were not enough: the least recently used model goes, and no other.
        await eventually(lambda: state_of(pool, models[0]) is ModelState.ABSENT)
        await asyncio.sleep(0.2)
        assert [state_of(pool, model) for model in models[1:]] == [ModelState.READY] * 2


async def test_nothing_goes_while_memory_is_on_its_way(machine: Machine) -> None:
    async with loaded(machine, "a", "b") as (pool, models):
        for model in models:
            machine.of(model).may_stop.clear()
        press(machine, 2**20)
        await eventually(lambda: state_of(pool, models[0]) is ModelState.EVICTING)
        await asyncio.sleep(0.2)
        assert state_of(pool, models[1]) is ModelState.READY
        for model in models:
            machine.of(model).may_stop.set()


async def test_leased_and_pinned_models_stay(machine: Machine) -> None:
    async with loaded(machine, "leased", "pinned", "idle") as (pool, models):
        leased, pinned, idle = models
        async with pool.runner(leased):
            press(machine, 2**33)
            await eventually(lambda: state_of(pool, idle) is ModelState.ABSENT)
            await asyncio.sleep(0.2)
            assert [state_of(pool, each) for each in (leased, pinned)] == [ModelState.READY] * 2
            machine.outside_bytes = 0


async def test_a_cache_that_fills_again_does_not_protect_idle_models(machine: Machine) -> None:
    async with loaded(machine, "busy", "idle") as (pool, models):
        busy, idle = models
        async with pool.runner(busy):
            press(machine, 2**20)
            runner = machine.runners(busy)[0]

            def fill() -> None:
                runner.cache_bytes = 2**20

            machine.before_measuring = fill
            await eventually(lambda: state_of(pool, idle) is ModelState.ABSENT)
            # With no idle model left, the caches are all that can go.
            machine.outside_bytes += 2**32
            seen = runner.trims
            await eventually(lambda: runner.trims > seen + 1)
            assert state_of(pool, busy) is ModelState.READY
            assert model_of(pool, busy).leases == 1


async def test_enough_memory_changes_nothing(machine: Machine) -> None:
    async with loaded(machine, "a") as (pool, models):
        press(machine, 0)
        await asyncio.sleep(0.2)
        assert state_of(pool, models[0]) is ModelState.READY
        assert machine.processes[0].trims == 0
