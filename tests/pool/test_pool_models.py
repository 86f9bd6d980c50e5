"""Models of an AsyncRunnerPool: their names, settings and needs, on a machine in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from runner_client import (
    AsyncRunnerPool,
    LoadOptions,
    MemoryEstimate,
    ModelSettings,
    ModelState,
    errors,
)
from runner_client.memory.estimation import estimate
from support.fake_child import write_model
from support.pool_machine import ONE, TWO, Machine, eventually, model_of, state_of, use


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


async def test_the_need_is_that_with_the_blas_of_the_runners(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries: list[str] = []

    def noted(model: str, *, blas: str, **options: Any) -> MemoryEstimate:
        libraries.append(blas)
        return estimate(model, blas=blas, **options)

    monkeypatch.setattr("runner_client.pool.appraisal.estimate", noted)
    async with AsyncRunnerPool(gate=machine.gate(), blas="off") as pool:
        await pool.load(machine.model("a"))
    assert libraries == ["off"]


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
        await pool.load(pinned)
        await eventually(lambda: state_of(pool, half) is ModelState.ABSENT)
        await pool.load(half)
        formats = [each.options.dtype for each in machine.runners(half)]
        assert formats == ["auto", "as_stored"]


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
