"""Leases of an AsyncRunnerPool: loads, evictions and refusals, on a machine in memory."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from runner_client import (
    AsyncRunnerPool,
    ModelSettings,
    ModelState,
    PoolModel,
    PoolSettings,
    PoolStatus,
    errors,
)
from support.pool_machine import ONE, TWO, Machine, eventually, model_of, reason_of, state_of, use


async def test_leases_share_a_runner_which_is_loaded_once(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        pids = await asyncio.gather(*(use(pool, model) for _ in range(20)))
        assert len(set(pids)) == 1
        async with pool.runner(model), pool.runner(model):
            assert model_of(pool, model).leases == 2
            assert model_of(pool, model).pid == pids[0]
    assert len(machine.processes) == 1


async def test_an_idle_model_goes_for_another(machine: Machine) -> None:
    first, second, third = (machine.model(name) for name in "abc")
    async with machine.pool(budget_bytes=TWO) as pool:
        for model in (first, second, first):
            await use(pool, model)
        scheduler = pool._manager.scheduler
        await eventually(
            lambda: all(
                scheduler._stays_until(each) < time.monotonic() for each in scheduler.models
            )
        )
        await use(pool, third)
        states = [state_of(pool, model) for model in (first, second, third)]
        assert states == [ModelState.READY, ModelState.ABSENT, ModelState.READY]
        assert pool.status().held_bytes <= TWO


async def test_no_eviction_means_a_refusal_with_numbers_and_names(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    async with machine.pool(budget_bytes=ONE) as pool:
        await use(pool, first)
        with pytest.raises(errors.InsufficientMemoryError) as caught:
            await pool.load(second, evict=False)
        text = str(caught.value)
        assert f"{second} needs 224.1 MiB" in text
        assert f"would have to go: {first}, idle for" in text
        assert caught.value.required_bytes == model_of(pool, first).held_bytes
        assert (caught.value.available_bytes or 0) < (caught.value.required_bytes or 0)
        assert state_of(pool, first) is ModelState.READY


async def test_pinned_models_stay(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    pinned = {first: ModelSettings(pinned=True)}
    async with machine.pool(budget_bytes=ONE, models=pinned) as pool:
        await use(pool, first)
        with pytest.raises(errors.InsufficientMemoryError, match="of which pinned models hold"):
            await pool.load(second)
        pool.unpin(first)
        await use(pool, second)
        assert state_of(pool, first) is ModelState.ABSENT
        pool.pin(second)
        with pytest.raises(errors.InsufficientMemoryError, match="pinned"):
            await pool.load(first)


async def test_a_budget_below_the_need_is_refused_at_once(machine: Machine) -> None:
    async with machine.pool(budget_bytes=2**20) as pool, asyncio.timeout(5):
        with pytest.raises(errors.InsufficientMemoryError, match=r"budget is 1.0 MiB"):
            await pool.load(machine.model("a"))
    assert machine.processes == []


async def test_a_machine_without_memory_is_refused_with_numbers(machine: Machine) -> None:
    machine.total_bytes = 2**20
    async with machine.pool() as pool:
        with pytest.raises(errors.InsufficientMemoryError, match=r"could give 1.0 MiB"):
            await pool.load(machine.model("a"))


async def test_an_idle_model_is_stopped_after_its_keep_alive(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool(default=ModelSettings(keep_alive_seconds=0.05)) as pool:
        async with pool.runner(model):
            await asyncio.sleep(0.1)
            assert state_of(pool, model) is ModelState.READY
        await eventually(lambda: state_of(pool, model) is ModelState.ABSENT)


async def test_a_model_in_use_yields_after_the_longest_wait(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    async with machine.pool(budget_bytes=ONE, max_wait_seconds=0.1) as pool:
        async with pool.runner(first):
            loading = asyncio.create_task(pool.load(second))
            await eventually(lambda: "get no new requests" in reason_of(pool, second))
            late = asyncio.create_task(use(pool, first))
            await asyncio.sleep(0.05)
            assert not late.done()
        await loading
        await late
    assert len(machine.runners(first)) == 2


async def test_a_pin_ends_the_yielding_of_a_model(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    third = machine.model("c")
    async with (
        machine.pool(budget_bytes=TWO, max_wait_seconds=0.1) as pool,
        pool.runner(first),
        pool.runner(second),
    ):
        loading = asyncio.create_task(pool.load(third))
        await eventually(lambda: "get no new requests" in reason_of(pool, third))
        pool.pin(first)
        # The pin is enough for a lease; the request still waits for the other model.
        async with asyncio.timeout(5), pool.runner(first):
            assert not loading.done()
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


async def test_progress_is_reported_with_the_reason_to_wait(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    seen: list[PoolModel] = []
    async with machine.pool(budget_bytes=ONE) as pool:
        await use(pool, first)
        machine.of(first).may_stop.clear()
        machine.of(second).may_load.clear()
        loading = asyncio.create_task(pool.load(second, on_progress=seen.append))
        # Not at once if the load of the first one has taken long: it stays for that time.
        await eventually(lambda: state_of(pool, first) is ModelState.EVICTING)
        await eventually(lambda: any(f"evicting {first}, idle for" in s.reason for s in seen))
        assert (seen[0].state, seen[0].position) == (ModelState.ABSENT, 1)
        machine.of(first).may_stop.set()
        await eventually(lambda: seen[-1].progress == 50)
        assert seen[-1].state is ModelState.LOADING
        machine.of(second).may_load.set()
        await loading


async def test_a_callback_that_raises_ends_its_own_wait_only(machine: Machine) -> None:
    model = machine.model("a")
    machine.of(model).may_load.clear()

    def fail(_: PoolModel) -> None:
        raise TimeoutError("the callback is late")

    async with machine.pool() as pool:
        other = asyncio.create_task(pool.load(model))
        with pytest.raises(TimeoutError, match="the callback is late"):
            await pool.load(model, on_progress=fail, timeout_seconds=60)
        machine.of(model).may_load.set()
        assert (await other).state is ModelState.READY


async def test_the_first_state_is_watched_at_once_and_close_ends_it(machine: Machine) -> None:
    model = machine.model("a")
    states: list[PoolStatus] = []

    async with machine.pool() as pool:

        async def watch() -> None:
            async for status in pool.watch():
                states.append(status)  # noqa: PERF401 - read before the end

        watching = asyncio.create_task(watch())
        await eventually(lambda: bool(states))
        assert states[0].models == ()
        await use(pool, model)
        await eventually(lambda: states[-1].models[0].idle_seconds is not None)
        await pool.close()
        await asyncio.wait_for(watching, 5)


async def test_a_watcher_that_stops_early_leaves_nothing(machine: Machine) -> None:
    async with machine.pool() as pool:
        watching = pool.watch()
        await anext(watching)
        await watching.aclose()
        assert not pool._manager._watchers
        async for _ in pool.watch():
            break


async def test_priority_goes_first_in_the_queue(machine: Machine) -> None:
    low, high, used = machine.model("low"), machine.model("high"), machine.model("used")
    machine.of(used).may_stop.clear()
    order: list[str] = []
    async with machine.pool(budget_bytes=ONE, models={high: ModelSettings(priority=5)}) as pool:
        await pool.load(used)

        async def take(model: str) -> None:
            async with pool.runner(model):
                order.append(model)

        tasks = [asyncio.create_task(take(low))]
        await eventually(lambda: len(pool.models()) == 2)
        tasks.append(asyncio.create_task(take(high)))
        await eventually(lambda: len(pool.models()) == 3)
        machine.of(used).may_stop.set()
        await asyncio.gather(*tasks)
    assert order == [high, low]


async def test_a_model_in_use_is_not_evicted_by_hand(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        async with pool.runner(model):
            with pytest.raises(errors.BusyError, match="used by 1"):
                await pool.evict(model)
        machine.of(model).may_stop.clear()
        tasks = [asyncio.create_task(pool.evict(model)) for _ in range(2)]
        await eventually(lambda: state_of(pool, model) is ModelState.EVICTING)
        machine.of(model).may_stop.set()
        first, second = await asyncio.gather(*tasks)
        assert first == second
        assert first.is_complete
        assert first.held_bytes > 2**27
        assert (await pool.evict(model)).held_bytes == 0


async def test_a_pool_is_entered_once(machine: Machine) -> None:
    pool = AsyncRunnerPool(PoolSettings(), gate=machine.gate())
    with pytest.raises(errors.RunnerUnavailableError, match="not open"):
        await pool.load(machine.model("a"))
    with pytest.raises(errors.RunnerUnavailableError, match="not open"):
        await anext(pool.watch())
    async with pool:
        with pytest.raises(errors.RunnerUnavailableError, match="entered once"):
            await pool.__aenter__()
    with pytest.raises(errors.RunnerUnavailableError, match="not open"):
        await pool.load(machine.model("a"))
    with pytest.raises(errors.RunnerUnavailableError, match="entered once"):
        await pool.__aenter__()
    async for _ in pool.watch():
        pytest.fail("a closed pool has no states")


async def test_a_request_chooses_how_long_a_model_stays(machine: Machine) -> None:
    model = machine.model("a")
    settings = ModelSettings(keep_alive_seconds=None)
    async with machine.pool(models={model: settings}) as pool:
        await pool.load(model)
        assert pool.kept_seconds(model) == math.inf
        pool.keep(model, 60.0)
        assert 59.0 < pool.kept_seconds(model) <= 60.0
        pool.keep(model, math.inf)
        assert model_of(pool, model).is_pinned
        pool.unpin(model)
        assert not model_of(pool, model).is_pinned
        pool.keep(model, 0.0)
        await eventually(lambda: state_of(pool, model) is ModelState.ABSENT)
        # No-op, because the model is not in memory.
        pool.keep(model, 60.0)
        await pool.load(model)
        assert pool.kept_seconds(model) == math.inf


async def test_a_pin_outlives_the_choice_of_a_request(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        await pool.load(model)
        pool.pin(model)
        pool.keep(model, 0.0)
        assert pool.kept_seconds(model) == math.inf
        with pytest.raises(errors.ModelNotLoadedError):
            pool.keep("unknown", 1.0)
