"""Starts and closes overtaken by another thread or task leave the newer child alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runner_client import AsyncRunnerProcess, MemoryGate, RunnerProcess, errors
from runner_client.process.aio_supervision import Supervisor as AsyncSupervisor
from runner_client.process.child import Child
from runner_client.process.supervision import Supervisor
from runner_client.rpc.aio_load import AsyncPendingLoad
from runner_client.rpc.load import PendingLoad
from support.fake_child import is_gone, use_fake_child, write_model

OVERTAKEN = [
    ("load", "wait_until_serving", "before"),
    ("load", "wait_until_serving", "after"),
    ("enter", "wait_until_serving", "before"),
    ("enter", "wait", "before"),
]
"""How a child is started, and the step before or after which another thread restarts it."""

OWNERS = {"wait_until_serving": Supervisor, "wait": PendingLoad}
ASYNC_OWNERS = {"wait_until_serving": AsyncSupervisor, "wait": AsyncPendingLoad}
"""Classes with the steps as methods."""

LIMIT_SECONDS = 30


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    use_fake_child(monkeypatch)
    return str(write_model(tmp_path / "tiny"))


def run_in_thread(act: Callable[[], object]) -> None:
    """Run a function in another thread and wait for the result."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(act).result(LIMIT_SECONDS)


def overtake(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    step: str,
    act: Callable[[], object],
    when: str = "after",
) -> None:
    """Patch a method to have another thread act before or after the first call."""
    original = getattr(owner, step)
    acts = [act]

    def overtaken(*args: Any) -> object:
        # Popped first, because the action calls the method again.
        now = acts.pop() if acts else None
        if now and when == "before":
            run_in_thread(now)
        result: object = original(*args)
        if now and when == "after":
            run_in_thread(now)
        return result

    monkeypatch.setattr(owner, step, overtaken)


def overtake_task(
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    act: Callable[[], Awaitable[object]],
    when: str = "before",
) -> None:
    """Patch a step of asyncio to have another task act around the first call."""
    owner = ASYNC_OWNERS[step]
    original = getattr(owner, step)
    acts = [act]

    async def overtaken(*args: Any) -> object:
        now = acts.pop() if acts else None
        if now and when == "before":
            await asyncio.gather(now())
        result: object = await original(*args)
        if now and when == "after":
            await asyncio.gather(now())
        return result

    monkeypatch.setattr(owner, step, overtaken)


@pytest.mark.parametrize(("start", "step", "when"), OVERTAKEN)
def test_an_overtaken_start_leaves_the_newer_child_alone(
    model: str, monkeypatch: pytest.MonkeyPatch, start: str, step: str, when: str
) -> None:
    runner = RunnerProcess(model)
    overtaken: list[int | None] = []

    def restart() -> None:
        overtaken.append(runner.pid)
        runner.restart()

    overtake(monkeypatch, OWNERS[step], step, restart, when)
    try:
        with pytest.raises(errors.RunnerUnavailableError):
            _ = runner.load() if start == "load" else runner.__enter__()
        assert overtaken[0] is not None
        assert is_gone(overtaken[0])
        assert not runner.has_exited
        assert runner.complete("Hi").content == "Hello world"
    finally:
        runner.close()


@pytest.mark.parametrize(("start", "step", "when"), OVERTAKEN)
async def test_an_overtaken_start_leaves_the_newer_child_alone_in_asyncio(
    model: str, monkeypatch: pytest.MonkeyPatch, start: str, step: str, when: str
) -> None:
    runner = AsyncRunnerProcess(model)
    overtaken: list[int | None] = []

    async def restart() -> None:
        overtaken.append(runner.pid)
        await runner.restart()

    overtake_task(monkeypatch, step, restart, when)
    try:
        with pytest.raises(errors.RunnerUnavailableError):
            await (runner.load() if start == "load" else runner.__aenter__())
        assert overtaken[0] is not None
        assert is_gone(overtaken[0])
        assert not runner.has_exited
        assert (await runner.complete("Hi")).content == "Hello world"
    finally:
        await runner.close()


def test_entering_does_not_wait_for_the_load_of_a_newer_child(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = RunnerProcess(model)
    overtake(monkeypatch, Supervisor, "start_watchdog", runner.restart)
    try:
        with pytest.raises(errors.RunnerUnavailableError):
            runner.__enter__()
        assert runner.complete("Hi").content == "Hello world"
    finally:
        runner.close()


async def test_cancelling_an_overtaken_start_leaves_the_newer_child_alone(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = AsyncRunnerProcess(model)
    loading = asyncio.create_task(runner.load())

    async def restart() -> None:
        await runner.restart()
        loading.cancel()

    overtake_task(monkeypatch, "wait_until_serving", restart)
    try:
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert (await runner.complete("Hi")).content == "Hello world"
    finally:
        await runner.close()


def test_an_overtaken_close_leaves_the_newer_child_alone(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = MemoryGate()
    runner = RunnerProcess(model, gate=gate)

    def start_anew() -> None:
        runner.close()
        runner.load()

    try:
        need = runner.load()
        overtake(monkeypatch, Child, "close", start_anew)
        runner.close()
        # The reservation of the newer child, minus the memory that it already holds.
        assert need.total_bytes / 2 < gate.check(need, override=True).reserved_bytes
        runner.wait_until_running()
        assert runner.complete("Hi").content == "Hello world"
    finally:
        runner.close()


async def test_an_overtaken_close_leaves_the_newer_child_alone_in_asyncio(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = AsyncRunnerProcess(model)
    loop = asyncio.get_running_loop()

    async def start_anew() -> None:
        await runner.close()
        await runner.load()

    def overtaking() -> None:
        asyncio.run_coroutine_threadsafe(start_anew(), loop).result(LIMIT_SECONDS)

    try:
        await runner.load()
        overtake(monkeypatch, Child, "close", overtaking)
        await runner.close()
        await runner.wait_until_running()
        assert (await runner.complete("Hi")).content == "Hello world"
    finally:
        await runner.close()


def test_entering_again_is_refused_and_leaves_the_first_running(model: str) -> None:
    with RunnerProcess(model) as runner:
        with pytest.raises(errors.RunnerUnavailableError, match="already started"):
            runner.__enter__()
        assert runner.complete("Hi").content == "Hello world"


async def test_entering_again_is_refused_and_leaves_the_first_running_in_asyncio(
    model: str,
) -> None:
    async with AsyncRunnerProcess(model) as runner:
        with pytest.raises(errors.RunnerUnavailableError, match="already started"):
            await runner.__aenter__()
        assert (await runner.complete("Hi")).content == "Hello world"
