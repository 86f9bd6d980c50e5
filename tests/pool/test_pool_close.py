"""The end of an AsyncRunnerPool at any moment leaves no runner, and no request that hangs."""

from __future__ import annotations

import asyncio

import pytest

from runner_client import AsyncRunnerPool, ModelState, PoolSettings, errors
from support.pool_machine import ONE, Machine, eventually, model_of, state_of, use


async def stopped(pool: AsyncRunnerPool) -> None:
    """Close a pool, soon."""
    async with asyncio.timeout(5):
        await pool.close()


async def test_a_close_voids_leases(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        async with pool.runner(model):
            await stopped(pool)
            assert machine.held_bytes == 0
        assert model_of(pool, model).leases == 0
        with pytest.raises(errors.RunnerUnavailableError, match="not open"):
            await pool.load(model)
        assert (await pool.evict(model)).held_bytes == 0


async def test_a_close_during_a_load_fails_the_requests(machine: Machine) -> None:
    model = machine.model("a")
    machine.of(model).may_load.clear()
    async with machine.pool() as pool:
        waiting = [asyncio.create_task(use(pool, model)) for _ in range(2)]
        await eventually(lambda: machine.held_bytes > 0)
        await stopped(pool)
        assert machine.held_bytes == 0
        ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [errors.RunnerUnavailableError] * 2
    assert "the pool is closed" in str(ends[0])


async def test_a_close_waits_for_runners_beside_a_cancelled_load(machine: Machine) -> None:
    model, loaded = machine.model("a"), machine.model("b")
    machine.of(model).may_load.clear()
    async with machine.pool() as pool:
        await pool.load(loaded)
        waiting = asyncio.create_task(use(pool, model))
        await eventually(lambda: state_of(pool, model) is ModelState.LOADING)
        machine.of(loaded).may_stop.clear()
        closing = asyncio.create_task(pool.close())
        await eventually(lambda: machine.runners(loaded)[0].is_stopping)
        await asyncio.sleep(0.05)
        assert not closing.done()
        machine.of(loaded).may_stop.set()
        await closing
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_close_during_an_eviction_waits_for_it(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    async with machine.pool(budget_bytes=ONE) as pool:
        await use(pool, first)
        machine.of(first).may_stop.clear()
        waiting = asyncio.create_task(use(pool, second))
        await eventually(lambda: state_of(pool, first) is ModelState.EVICTING)
        evicting = asyncio.create_task(pool.evict(first))
        closings = [asyncio.create_task(pool.close()) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(each.done() for each in closings)
        machine.of(first).may_stop.set()
        await asyncio.gather(*closings)
        assert (await evicting).held_bytes > 0
        with pytest.raises(errors.RunnerUnavailableError):
            await waiting
    assert len(machine.processes) == 1


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancelled_close_kills_the_runners(machine: Machine, turns: int) -> None:
    """At any moment: ``turns`` of the event loop after its start."""
    loaded, loading = machine.model("a"), machine.model("b")
    for model in (loaded, loading):
        machine.of(model).may_stop.clear()
    machine.of(loading).may_load.clear()
    async with machine.pool() as pool:
        await pool.load(loaded)
        waiting = asyncio.create_task(pool.load(loading))
        await eventually(lambda: len(machine.processes) == 2 and machine.processes[1].is_running)
        closing = asyncio.create_task(pool.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing], timeout=5)
        assert closing.cancelled()
        if turns > 0:
            assert machine.held_bytes == 0
        # A close that never began.
        machine.of(loaded).may_stop.set()
        machine.of(loading).may_stop.set()
        await pool.close()
        assert machine.held_bytes == 0
        await asyncio.gather(waiting, return_exceptions=True)


async def test_another_close_outlives_a_cancelled_one(machine: Machine) -> None:
    model = machine.model("a")
    machine.of(model).may_stop.clear()
    async with machine.pool() as pool:
        await pool.load(model)
        first, second = (asyncio.create_task(pool.close()) for _ in range(2))
        await eventually(lambda: machine.processes[0].is_stopping)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled()
        await second
        assert machine.held_bytes == 0


async def test_an_exception_in_the_block_is_kept(machine: Machine) -> None:
    model = machine.model("a")
    with pytest.raises(ArithmeticError):
        async with machine.pool() as pool, pool.runner(model):
            raise ArithmeticError
    assert machine.held_bytes == 0


async def test_a_block_that_is_cancelled_ends_in_order(machine: Machine) -> None:
    model = machine.model("a")
    leased = asyncio.Event()

    async def program() -> None:
        async with machine.pool() as pool, pool.runner(model):
            leased.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(program())
    await leased.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert machine.held_bytes == 0


def test_a_program_that_ends_without_a_close_leaves_no_runner(machine: Machine) -> None:
    async def program() -> None:
        pool = AsyncRunnerPool(PoolSettings(), gate=machine.gate())
        await pool.__aenter__()
        machine.of(model).may_load.clear()
        loading = asyncio.create_task(pool.load(model))
        await eventually(lambda: machine.held_bytes > 0)
        assert not loading.done()

    model = machine.model("a")
    asyncio.run(program())
    assert machine.held_bytes == 0


async def test_one_runner_that_cannot_be_stopped_in_order_delays_no_other(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = machine.model("a"), machine.model("b")

    def fail() -> None:
        raise OSError("no such file")

    async with machine.pool() as pool:
        for model in (first, second):
            await pool.load(model)
        machine.before_measuring = fail
        await stopped(pool)
    assert machine.held_bytes == 0
    assert "a runner was not stopped in order" in caplog.text
