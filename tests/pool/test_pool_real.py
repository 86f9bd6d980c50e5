"""Pools with real runners of tiny models."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from runner_client import (
    AsyncRunnerPool,
    LoadOptions,
    MemoryGate,
    ModelSettings,
    ModelState,
    Options,
    PoolSettings,
    RunnerPool,
    RunnerProcess,
    errors,
)
from runner_client.memory.estimation import BARE_PROCESS_BYTES, estimate
from runner_client.process.aio_spare import SpareProcess
from runner_common.memory.reservations import ReservationBook
from support.fake_child import is_gone
from support.pool_machine import eventually, model_of, state_of, use

pytestmark = [pytest.mark.mlx]

OPTIONS = LoadOptions(context_length=256, parallel=2, prefix_cache_bytes=2**20)
GREEDY = Options(temperature=0, num_predict=8)
Models = tuple[str, str]


@pytest.fixture(scope="session")
def models(model_dir: Callable[..., Path]) -> Models:
    """Two tiny models of about the same size."""
    return str(model_dir(seed=1)), str(model_dir(seed=2))


def settings_for(count: int, models: Models) -> PoolSettings:
    """Return settings with a budget for some of the models."""
    need = max(estimate(model, options=OPTIONS).total_bytes for model in models)
    return PoolSettings(
        budget_bytes=count * need,
        min_residence_seconds=0.0,
        default=ModelSettings(options=OPTIONS),
    )


async def test_models_take_turns_within_the_budget(models: Models) -> None:
    first, second = models
    async with AsyncRunnerPool(settings_for(1, models)) as pool:
        async with pool.runner(first) as runner, pool.runner(first) as same:
            answers = await asyncio.gather(
                runner.complete("def", options=GREEDY), same.complete("def", options=GREEDY)
            )
            assert answers[0].content == answers[1].content
            pid = model_of(pool, first).pid
            assert pid is not None
        assert pool.status().held_bytes <= (pool.status().budget_bytes or 0)
        other = await use(pool, second)
        assert other != pid
        assert is_gone(pid)
        described = model_of(pool, first)
        assert (described.state, described.last_error) == (ModelState.ABSENT, "")
        with ReservationBook().locked() as view:
            assert [each.pid for each in view.records()] == [other]
        os.kill(other or 0, signal.SIGKILL)
        await eventually(lambda: state_of(pool, second) is ModelState.ABSENT)
        assert await use(pool, second) not in (None, pid, other)


async def imported_bytes(spare: SpareProcess) -> int:
    """Wait until a process has imported MLX; return its resident set."""
    while not (status := await spare.client.status()).device:  # noqa: ASYNC110 - has no event
        await asyncio.sleep(0.05)
    return status.memory_usage.process_bytes


async def test_a_spare_process_loads_the_next_model(models: Models) -> None:
    settings = replace(settings_for(1, models), spare_processes=1)
    budget = (settings.budget_bytes or 0) + BARE_PROCESS_BYTES
    async with AsyncRunnerPool(replace(settings, budget_bytes=budget)) as pool:
        for model in (*models, models[0]):
            await eventually(lambda: pool.status().spare_count == 1, seconds=60)
            (spare,) = pool._manager.spares.processes
            assert await imported_bytes(spare) < BARE_PROCESS_BYTES
            async with pool.runner(model) as runner:
                assert (await runner.complete("def", options=GREEDY)).content
                assert model_of(pool, model).pid == spare.pid
            assert pool.status().held_bytes <= budget
            assert model_of(pool, model).last_error == ""


async def test_real_models_are_not_loaded_where_they_cannot_be(
    models: Models, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models[0], broken)
    (broken / "config.json").write_text('{"model_type": "unheard_of"}')
    async with AsyncRunnerPool(settings_for(1, models)) as pool:
        with pytest.raises(errors.ModelUnsupportedError):
            await pool.load(str(broken))
        with pytest.raises(errors.InvalidRequestError, match="context_length"):
            await load_with(LoadOptions(context_length=10**6), models[0])
    assert not psutil.Process().children()


async def load_with(options: LoadOptions, model: str) -> None:
    """Load a model in a pool with these options."""
    async with AsyncRunnerPool(PoolSettings(default=ModelSettings(options=options))) as pool:
        await pool.load(model)


@pytest.mark.slow
def test_two_pools_and_a_runner_keep_reservations(models: Models) -> None:
    settings = settings_for(1, models)
    gate = MemoryGate()
    with (
        RunnerPool(settings, gate=gate) as first,
        RunnerPool(settings, gate=gate) as second,
        RunnerProcess(models[0], options=OPTIONS, gate=gate) as plain,
        first.runner(models[0]) as one,
        second.runner(models[1]) as two,
    ):
        texts = [each.complete("def", options=GREEDY).content for each in (plain, one, two)]
        assert texts[0] == texts[1]
        with ReservationBook().locked() as view:
            owners = {record.pid for record in view.records()}
        pids = {plain.pid, first.models()[0].pid, second.models()[0].pid}
        assert owners == pids
        assert len(pids) == 3
    with ReservationBook().locked() as view:
        assert view.records() == ()
