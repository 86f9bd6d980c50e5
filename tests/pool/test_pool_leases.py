"""Leases of an AsyncRunnerPool: loads, evictions and refusals, on a machine in memory."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from runner_client import (
    AsyncRunnerPool,
    LoadOptions,
    ModelSettings,
    ModelState,
    PoolModel,
    PoolSettings,
    PoolStatus,
    errors,
)
from support.fake_child import write_model
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
        assert (await loading).state is ModelState.READY
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
        await eventually(lambda: state_of(pool, first) is ModelState.EVICTING)
        await eventually(lambda: bool(seen))
        assert (seen[0].state, seen[0].position) == (ModelState.ABSENT, 1)
        assert f"evicting {first}, idle for" in seen[0].reason
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


async def test_names_of_one_directory_are_one_model(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = machine.model("a")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    async with machine.pool() as pool:
        for name in (model, model + "/", "a", "./a", str(tmp_path / "link")):
            await pool.load(name)
        assert [each.name for each in pool.models()] == [model]
        pool.pin("./a")
        assert pool.models()[0].is_pinned
    assert len(machine.processes) == 1


def as_hub_model(machine: Machine, home: Path, hub_id: str) -> str:
    """Put a model into the hub's cache, and return its directory."""
    repository = home / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    behaviour = machine.of(machine.model("hub"))
    (machine.folder / "hub").rename(snapshot)
    machine.behaviours[str(snapshot)] = behaviour
    return str(snapshot)


@pytest.mark.parametrize("first", ["id", "directory"])
async def test_settings_of_a_hub_id_hold_for_its_directory(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    directory = as_hub_model(machine, tmp_path / "cache", "org/chat")
    settings = ModelSettings(options=LoadOptions(context_length=64), pinned=True)
    names = ("org/chat", directory) if first == "id" else (directory, "org/chat")
    async with machine.pool(models={"org/chat": settings}) as pool:
        for name in names:
            await pool.load(name)
            await pool.evict(name)
        (only,) = pool.models()
        assert only.is_pinned
    assert [each.options.context_length for each in machine.processes] == [64, 64]


async def test_unknown_models_are_refused(machine: Machine) -> None:
    async with machine.pool() as pool:
        with pytest.raises(errors.ModelNotFoundError):
            await pool.load("/nowhere/at/all")
        for call in (pool.pin, pool.unpin):
            with pytest.raises(errors.ModelNotLoadedError, match="never requested"):
                call("org/none")
        with pytest.raises(errors.ModelNotLoadedError, match="never requested"):
            await pool.evict("org/none")
        assert pool.models() == ()


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


async def test_a_default_prefix_cache_takes_what_the_budget_leaves(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool() as pool:
        needed = sum((await pool.load(model)).parts.values())
    async with machine.pool(budget_bytes=needed - 8192) as pool:
        loaded = await pool.load(model)
        assert loaded.parts["prefix cache"] == 8192
        assert loaded.held_bytes == needed - 8192


async def test_a_default_prefix_cache_is_no_larger_than_the_machine(machine: Machine) -> None:
    """The budget has room for a cache that the machine has not."""
    model = machine.model("a")
    async with machine.pool() as pool:
        parts = (await pool.load(model)).parts
    needed = sum(parts.values())
    machine.total_bytes = needed - parts["prefix cache"] + 4096
    async with machine.pool(budget_bytes=needed - 8192) as pool:
        assert (await pool.load(model)).parts["prefix cache"] == 2048


@pytest.mark.parametrize(("spare", "expected"), [(2**20, "auto"), (-(2**20), "as_stored")])
async def test_the_stored_format_is_for_models_that_never_fit(
    machine: Machine, spare: int, expected: str
) -> None:
    path = str(write_model(machine.folder / "half", 2**26, "F16"))
    machine.behaviours[path] = machine.of(machine.model("a"))
    other = machine.model("b")
    options = LoadOptions(dtype="auto_or_stored", prefix_cache_bytes=0)
    async with machine.pool(default=ModelSettings(options=options)) as pool:
        needed = (await pool.load(path)).held_bytes
    settings = ModelSettings(options=options)
    async with machine.pool(budget_bytes=needed + spare, models={path: settings}) as pool:
        await use(pool, other)
        await pool.load(path)
        assert state_of(pool, other) is ModelState.ABSENT or expected == "as_stored"
    assert machine.runners(path)[-1].options.dtype == expected


async def test_pinned_models_leave_less_for_a_cache_or_a_format(machine: Machine) -> None:
    pinned, cached, half = machine.model("pinned"), machine.model("a"), machine.model("half")
    replace_model(half, 2**26, "F16")
    settings = {
        pinned: ModelSettings(pinned=True),
        half: ModelSettings(
            options=LoadOptions(dtype="auto_or_stored", prefix_cache_bytes=0), keep_alive_seconds=0
        ),
    }
    async with machine.pool() as pool:
        needed = (await pool.load(cached)).held_bytes
    async with machine.pool(budget_bytes=2 * needed - 8192, models=settings) as pool:
        await pool.load(pinned)
        assert (await pool.load(cached)).parts["prefix cache"] == 8192
    async with machine.pool(budget_bytes=2 * needed + 2**26, models=settings) as pool:
        await pool.load(half)
        assert machine.processes[-1].options.dtype == "auto"
        await pool.load(pinned)
        await eventually(lambda: state_of(pool, half) is ModelState.ABSENT)
        await pool.load(half)
        assert machine.processes[-1].options.dtype == "as_stored"


async def test_a_link_to_another_model_is_another_model(machine: Machine, tmp_path: Path) -> None:
    first, second, link = machine.model("a"), machine.model("b"), tmp_path / "current"
    link.symlink_to(first)
    async with machine.pool() as pool:
        await pool.load(str(link))
        await pool.evict(str(link))
        link.unlink()
        link.symlink_to(second)
        await pool.load(str(link))
        await pool.load(first)
        assert [each.path for each in machine.processes] == [first, second, first]
        paths = {each.name: each.path for each in pool.models()}
        assert paths == {str(link): first, second: second}


async def test_a_model_replaced_while_loaded_is_appraised_anew(machine: Machine) -> None:
    model = machine.model("a")
    async with machine.pool(budget_bytes=TWO) as pool:
        small = (await pool.load(model)).held_bytes
        replace_model(model, 2**23)
        await use(pool, model)
        assert model_of(pool, model).held_bytes == small
        machine.of(model).may_stop.clear()
        evicting = asyncio.create_task(pool.evict(model))
        await eventually(lambda: state_of(pool, model) is ModelState.EVICTING)
        # Requested while the old one is still there.
        loading = asyncio.create_task(pool.load(model))
        await asyncio.sleep(0.05)
        machine.of(model).may_stop.set()
        await evicting
        assert (await loading).held_bytes > small + 2**22


async def test_a_model_that_grew_since_its_appraisal_breaks_no_budget(machine: Machine) -> None:
    first, second = machine.model("a"), machine.model("b")
    machine.of(first).may_stop.clear()
    async with machine.pool(budget_bytes=ONE) as pool:
        await use(pool, first)
        loading = asyncio.create_task(pool.load(second))
        await eventually(lambda: state_of(pool, first) is ModelState.EVICTING)
        replace_model(second, 2**26)
        machine.of(first).may_stop.set()
        with pytest.raises(errors.RunnerError, match="changed"):
            await loading
        with pytest.raises(errors.InsufficientMemoryError, match="budget"):
            await pool.load(second)


def replace_model(model: str, weight_bytes: int, dtype: str = "F32") -> None:
    """Replace the files of a model by larger ones."""
    new = write_model(Path(f"{model}.new"), weight_bytes, dtype)
    for path in new.iterdir():
        path.replace(Path(model) / path.name)


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
