"""Faults in an AsyncRunnerPool: deaths, failed loads, lost memory and defects."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from runner_client import (
    AsyncRunnerPool,
    ModelState,
    RestartPolicy,
    errors,
)
from runner_client.pool import aio_manager
from runner_client.pool.scheduling.scheduler import PoolScheduler
from support.pool_machine import ONE, TWO, Machine, eventually, model_of, reason_of, state_of, use

SHORT_SECONDS = 5.0
"""Limit on what must happen soon."""


@pytest.mark.parametrize("is_leased", [True, False])
async def test_a_dead_runner_is_replaced_within_the_policy(
    machine: Machine, is_leased: bool
) -> None:
    model = machine.model("a")
    policy = RestartPolicy(max_restarts=1, window_seconds=500)
    async with machine.pool(policy=policy) as pool:
        pids = []
        for _ in range(2):
            async with pool.runner(model):
                pids.append(model_of(pool, model).pid)
                if is_leased:
                    machine.processes[-1].die()
            if not is_leased:
                machine.processes[-1].die()
            await eventually(lambda: state_of(pool, model) is ModelState.ABSENT)
            assert "SIGKILL" in model_of(pool, model).last_error
        assert len(set(pids)) == 2
        with pytest.raises(errors.RunnerUnavailableError) as caught:
            await pool.load(model)
        text = "have died 2 times within 500 s; it is refused for another 500 s. The last one: the"
        assert text in str(caught.value)
        assert await use(pool, machine.model("other"))


async def test_the_refusal_ends_with_the_window(machine: Machine) -> None:
    model = machine.model("a")
    policy = RestartPolicy(max_restarts=0, window_seconds=0.3)
    async with machine.pool(policy=policy) as pool:
        await pool.load(model)
        machine.processes[-1].die()
        await eventually(lambda: state_of(pool, model) is ModelState.ABSENT)
        with pytest.raises(errors.RunnerUnavailableError, match="have died 1 times"):
            await pool.load(model)
        await asyncio.sleep(0.3)
        assert (await pool.load(model)).state is ModelState.READY


async def test_a_death_between_grant_and_use_is_a_typed_error(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = machine.model("a")
    machine.of(model).may_load.clear()
    async with machine.pool() as pool:
        leasing = asyncio.create_task(use(pool, model))
        await eventually(lambda: state_of(pool, model) is ModelState.LOADING)
        entry = pool._manager.entries[model]
        grant = pool._manager._grant

        def die_at_once(*args: Any) -> None:
            grant(*args)
            assert entry.member is not None
            pool._manager._note_death(entry, entry.member)

        monkeypatch.setattr(pool._manager, "_grant", die_at_once)
        machine.of(model).may_load.set()
        with pytest.raises(errors.RunnerUnavailableError, match="is gone"):
            await leasing
        assert model_of(pool, model).leases == 0


@pytest.mark.parametrize(
    "failure",
    [
        errors.RunnerExitedError(
            "gone", exit_code=-9, exit_reason="", stderr_tail=(), last_memory_bytes=None
        ),
        errors.ModelUnsupportedError("no such layer"),
        ValueError("a defect"),
    ],
)
async def test_a_failed_load_reaches_everyone_who_waits(
    machine: Machine, failure: Exception
) -> None:
    model, other = machine.model("a"), machine.model("b")
    machine.of(model).loads.append(failure)
    machine.of(model).may_load.clear()
    async with machine.pool(budget_bytes=ONE) as pool:
        waiting = [asyncio.create_task(use(pool, model)) for _ in range(3)]
        await eventually(lambda: len(pool._manager.scheduler.waiting()) == 3)
        machine.of(model).may_load.set()
        async with asyncio.timeout(SHORT_SECONDS):
            ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert ends == [failure] * 3
        assert str(failure) in model_of(pool, model).last_error
        assert pool.status().held_bytes == 0
        assert machine.held_bytes == 0
        # The memory is there for others, and the next request tries again.
        await use(pool, other)
        await use(pool, model)
        assert model_of(pool, model).last_error == ""


def refusal() -> errors.LoadRequiresFullError:
    """Return the gate's refusal after another scheduler took the memory."""
    return errors.LoadRequiresFullError("taken", required_bytes=2, available_bytes=1)


async def test_a_load_refused_by_the_gate_is_tried_again(machine: Machine) -> None:
    model = machine.model("a")
    machine.of(model).loads.extend([refusal(), refusal(), None])
    async with machine.pool() as pool:
        assert (await pool.load(model)).state is ModelState.READY
    assert len(machine.processes) == 3


async def test_a_load_that_the_gate_keeps_refusing_fails(machine: Machine) -> None:
    model = machine.model("a")
    machine.of(model).loads.extend(refusal() for _ in range(50))
    async with machine.pool() as pool, asyncio.timeout(SHORT_SECONDS):
        with pytest.raises(errors.LoadRequiresFullError, match="taken"):
            await pool.load(model)
        assert len(machine.processes) == aio_manager._MAX_REFUSALS


async def test_refusals_of_requests_that_are_gone_do_not_count(machine: Machine) -> None:
    model = machine.model("a")
    refusals = [refusal()] * (aio_manager._MAX_REFUSALS - 1)
    machine.of(model).loads.extend([*refusals, asyncio.Event()])
    async with machine.pool() as pool:
        loading = asyncio.create_task(pool.load(model))
        await eventually(lambda: len(machine.processes) == aio_manager._MAX_REFUSALS)
        await eventually(lambda: not machine.of(model).loads)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await eventually(lambda: state_of(pool, model) is ModelState.ABSENT)
        machine.of(model).loads.append(refusal())
        assert (await pool.load(model)).state is ModelState.READY


async def test_a_caller_cancelled_while_waiting_ends_the_load(machine: Machine) -> None:
    model = machine.model("a")
    machine.of(model).may_load.clear()
    async with machine.pool() as pool:
        waiting = [asyncio.create_task(use(pool, model)) for _ in range(2)]
        await eventually(lambda: len(pool._manager.scheduler.waiting()) == 2)
        await eventually(lambda: machine.held_bytes > 0)
        for number, task in enumerate(waiting):
            assert state_of(pool, model) is ModelState.LOADING, number
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: state_of(pool, model) is ModelState.ABSENT)
        assert machine.held_bytes == 0
        machine.of(model).may_load.set()
        await use(pool, model)


async def test_a_lease_granted_to_a_cancelled_caller_comes_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = machine.model("a")
    machine.of(model).may_load.clear()
    async with machine.pool() as pool:
        leasing = asyncio.create_task(use(pool, model))
        await eventually(lambda: len(pool._manager.scheduler.waiting()) == 1)
        grant = pool._manager._grant

        def cancel_then(*args: Any) -> None:
            grant(*args)
            leasing.cancel()

        monkeypatch.setattr(pool._manager, "_grant", cancel_then)
        machine.of(model).may_load.set()
        with pytest.raises(asyncio.CancelledError):
            await leasing
        assert model_of(pool, model).leases == 0
        assert (await pool.evict(model)).is_complete


async def test_a_caller_cancelled_in_a_lease_gives_it_back(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        leased = asyncio.Event()

        async def hold() -> None:
            async with pool.runner(model):
                leased.set()
                await asyncio.Event().wait()

        holding = asyncio.create_task(hold())
        await leased.wait()
        assert model_of(pool, model).leases == 1
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        assert model_of(pool, model).leases == 0


async def test_a_timeout_names_the_reason_and_the_phase(machine: Machine) -> None:
    model, used = machine.model("a"), machine.model("b")
    async with machine.pool(budget_bytes=ONE) as pool:
        machine.of(model).may_load.clear()
        other = asyncio.create_task(pool.load(model))
        await eventually(lambda: machine.held_bytes > 0)
        with pytest.raises(errors.RunnerTimeoutError, match="it is loading, 50 % loaded") as caught:
            await pool.load(model, timeout_seconds=0.1)
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        assert (caught.value.phase, caught.value.timeout_seconds) == ("load", 0.1)
        async with pool.runner(used):
            with pytest.raises(errors.RunnerTimeoutError, match=f"{used}, used by 1"):
                await pool.load(model, timeout_seconds=0.5)
            # A loaded model needs no time.
            async with pool.runner(used, timeout_seconds=0):
                pass


async def test_memory_that_does_not_come_back_is_reported(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool(return_seconds=0.2) as pool:
        await use(pool, model)
        machine.of(model).may_stop.clear()
        evicting = asyncio.create_task(pool.evict(model))
        await eventually(lambda: machine.runners(model)[0].is_stopping)
        machine.lost_bytes = machine.held_bytes
        begin = time.monotonic()
        machine.of(model).may_stop.set()
        assert not (await evicting).is_complete
        assert 0.2 <= time.monotonic() - begin < SHORT_SECONDS
        text = model_of(pool, model).last_error
        assert "evicted, but only 0 B of the 224.1 MiB it held came back within 0." in text


@pytest.mark.parametrize("again", [False, True])
async def test_memory_is_measured_while_the_next_load_runs(machine: Machine, again: bool) -> None:
    first, second = machine.model("a"), machine.model("b")
    machine.total_bytes = TWO + ONE
    async with machine.pool(budget_bytes=ONE, return_seconds=0.5) as pool:
        await use(pool, first)
        machine.of(first).may_stop.clear()
        loading = asyncio.create_task(pool.load(second))
        await eventually(lambda: machine.runners(first)[0].is_stopping)
        evicting = asyncio.create_task(pool.evict(first))
        # Another program takes what the first model gives back.
        machine.outside_bytes = machine.held_bytes
        begin = time.monotonic()
        machine.of(first).may_stop.set()
        await loading
        if again:
            await use(pool, first)
        returned = await evicting
        assert time.monotonic() - begin >= 0.5
        assert returned.returned_bytes <= 0
        # What a loaded model's last runner did is no error of this one.
        text = model_of(pool, first).last_error
        assert text == ("" if again else f"evicted, but only {returned}")
        assert state_of(pool, first) is (ModelState.READY if again else ModelState.ABSENT)


async def test_neither_a_load_nor_the_end_waits_for_needless_memory(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    machine.total_bytes = TWO
    async with asyncio.timeout(SHORT_SECONDS):
        async with machine.pool(budget_bytes=ONE, return_seconds=1000) as pool:
            await use(pool, first)
            machine.of(first).may_stop.clear()
            loading = asyncio.create_task(pool.load(second))
            await eventually(lambda: machine.runners(first)[0].is_stopping)
            machine.lost_bytes = machine.held_bytes
            machine.of(first).may_stop.set()
            await loading


async def test_memory_that_another_load_takes_has_come_back(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    async with machine.pool(return_seconds=0.2) as pool:
        await use(pool, first)
        machine.of(first).may_stop.clear()
        evicting = asyncio.create_task(pool.evict(first))
        await eventually(lambda: machine.runners(first)[0].is_stopping)
        await pool.load(second)
        machine.of(first).may_stop.set()
        assert (await evicting).is_complete
        assert model_of(pool, first).last_error == ""


async def test_the_next_load_counts_on_measured_memory_only(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    machine.total_bytes = ONE
    async with machine.pool(return_seconds=0.1) as pool:
        await use(pool, first)
        machine.of(first).may_stop.clear()
        loading = asyncio.create_task(pool.load(second))
        await eventually(lambda: machine.runners(first)[0].is_stopping)
        machine.lost_bytes = machine.held_bytes
        machine.of(first).may_stop.set()
        with pytest.raises(errors.InsufficientMemoryError, match="the machine could give"):
            await loading
    assert not machine.runners(second)


async def test_a_defect_fails_every_request_and_hangs_none(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loaded = machine.model("a"), machine.model("b")
    machine.of(model).may_load.clear()
    async with machine.pool() as pool, asyncio.timeout(SHORT_SECONDS):
        await pool.load(loaded)
        waiting = asyncio.create_task(pool.load(model))
        await eventually(lambda: state_of(pool, model) is ModelState.LOADING)
        watching = asyncio.create_task(watched(pool))

        def fail(*_: object) -> None:
            raise ArithmeticError("a defect")

        async with pool.runner(loaded):
            monkeypatch.setattr(PoolScheduler, "decide", fail)
            pool._manager.notify()
            with pytest.raises(errors.RunnerUnavailableError, match="the pool has failed"):
                await waiting
            with pytest.raises(errors.RunnerUnavailableError, match="the pool has failed"):
                await pool.load(model)
            await watching
        assert (await pool.evict(loaded)).is_complete


async def watched(pool: AsyncRunnerPool) -> int:
    """Return the number of states until the pool is closed."""
    return len([each async for each in pool.watch()])


async def test_a_measurement_that_fails_leaves_no_runner(machine: Machine) -> None:
    model = machine.model("a")

    def fail() -> None:
        raise OSError("no such file")

    async with machine.pool() as pool:
        await pool.load(model)
        machine.before_measuring = fail
        with pytest.raises(OSError, match="no such file"):
            await pool.evict(model)
        assert machine.held_bytes == 0
        assert state_of(pool, model) is ModelState.ABSENT


async def test_an_eviction_at_the_end_of_a_load_wins(machine: Machine) -> None:
    """The runner of a load that ends while the load is cancelled is not leased."""
    model = machine.model("a")
    machine.of(model).may_load.clear()
    async with machine.pool() as pool:
        leasing = asyncio.create_task(use(pool, model))
        await eventually(lambda: machine.held_bytes > 0)
        manager = pool._manager
        # Both in one turn of the event loop: the load is about to end, and nobody waits for it.
        machine.of(model).may_load.set()
        manager.begin_eviction(manager.entries[model], "a test")
        assert await leasing
        assert len(machine.processes) == 2
        assert [each.is_running for each in machine.processes] == [False, True]
        await eventually(lambda: reason_of(pool, model) == "")
        assert state_of(pool, model) is ModelState.READY
