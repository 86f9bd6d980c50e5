"""A pool soak from start to end: the reference answers, then one phase after the other."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from runner_client import (
    AsyncRunnerClient,
    AsyncRunnerPool,
    AsyncRunnerProcess,
    MemoryGate,
    ModelSettings,
    ModelState,
    PoolSettings,
    PoolStatus,
)
from runner_common.host_memory.free import FreeMemory, free_memory
from runner_common.memory.reservations import DIRECTORY_VARIABLE
from soak.pool import watch
from soak.pool.callers import Caller, Known, reference
from soak.pool.mix import MAX_NEW_TOKENS, PoolMix, known_prompts
from soak.pool.models import OPTIONS, RESIDENT, Models, prepare
from soak.pool.outcome import Look
from soak.pool.plain import PlainProcess
from soak.pool.records import Phase, PoolOrder, PoolRun, Rest
from soak.records import SoakError
from soak.session import Settings, count_tracebacks, describe

logger = logging.getLogger("soak")

CALLERS = 8
POOL, FIRST_POOL, SECOND_POOL, PROCESS = "the pool", "pool 1", "pool 2", "the process"
SHARED_SHARE = 0.25
"""Share of the time for the phase with two pools and a process."""

SHARED_MODELS = 3
"""Number of models for which the memory of that phase is enough."""

MIN_RESIDENCE_SECONDS, MAX_WAIT_SECONDS, KEEP_ALIVE_SECONDS = 1.0, 5.0, 20.0
"""Settings of the pools, shorter than the defaults for more loads and evictions."""

_SETTLE_SECONDS = 3.0


class Soak:
    """A run in progress.

    Args:
        run: Receives the results.
        models: Models of the pools.
        known: Prompts and reference answers.
        samples: File with the samples of the watching process.
    """

    def __init__(self, run: PoolRun, models: Models, known: Known, samples: Path) -> None:
        self._run = run
        self._models = models
        self._known = known
        self._samples = samples
        self._process = psutil.Process()
        self._pids: dict[int, str] = {}
        self._stops: dict[int, float] = {}

    async def one_pool(self, seconds: float) -> None:
        """Run one pool with a budget for two models, and eight callers."""
        phase = self._phase("one pool", seconds, RESIDENT, POOL)
        settings = _settings(phase.limit_bytes)

        async def load(end: float) -> None:
            async with self._pool(settings) as pool:
                await _together(self._callers(POOL, pool, phase, CALLERS, end))

        await self._measure(phase, load)

    async def shared(self, seconds: float) -> None:
        """Run two pools and a plain process on a machine with memory for three models.

        They share nothing but the machine's reservations. Free memory is simulated: the limit
        of the phase, less the resident set of all runners.
        """
        phase = self._phase(
            "two pools and a process", seconds, SHARED_MODELS, FIRST_POOL, SECOND_POOL, PROCESS
        )

        async def load(end: float) -> None:
            with tempfile.TemporaryDirectory() as folder:
                env = {DIRECTORY_VARIABLE: folder}
                async with AsyncExitStack() as stack:
                    plain = await stack.enter_async_context(self._plain(phase, env))
                    work = [plain.run(end)]
                    for name in (FIRST_POOL, SECOND_POOL):
                        gate = self._gate(phase, env)
                        pool = self._pool(_settings(None), gate=gate, env=env)
                        opened = await stack.enter_async_context(pool)
                        work += self._callers(name, opened, phase, CALLERS // 2, end, is_short=True)
                    await _together(work)

        await self._measure(phase, load)

    def _phase(self, name: str, seconds: float, models: int, *schedulers: str) -> Phase:
        limit, needs = self._models.largest(models), self._models.needs
        phase = Phase(name, seconds, limit, needs, frozenset(schedulers))
        self._run.phases.append(phase)
        return phase

    async def _measure(self, phase: Phase, load: Callable[[float], Awaitable[None]]) -> None:
        gc.collect()
        before, begin = self._process.num_fds(), time.monotonic()
        self._pids.clear()
        self._stops.clear()
        logger.info("%s: starting %.0f s of load", phase.name, phase.seconds)
        await load(asyncio.get_running_loop().time() + phase.seconds)
        phase.rest = await self._rest(before)
        end = begin + phase.seconds
        phase.samples = watch.read(self._samples, begin, end, self._pids, self._stops)
        phase.loads.update(self._pids.values())

    async def _rest(self, descriptors: int) -> Rest:
        """Return the least that remains within ``_SETTLE_SECONDS``."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            gc.collect()
            rest = Rest(
                runners=len(watch.runners(self._process)),
                zombies=len(watch.zombies(self._process)),
                descriptors=self._process.num_fds() - descriptors,
            )
            is_clean = not (rest.runners or rest.zombies) and rest.descriptors <= 0
            if is_clean or time.monotonic() > deadline:
                return rest
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def _pool(
        self,
        settings: PoolSettings,
        gate: MemoryGate | None = None,
        env: dict[str, str] | None = None,
    ) -> AsyncIterator[AsyncRunnerPool]:
        async with AsyncRunnerPool(settings, gate=gate, env=env) as pool:
            following = asyncio.create_task(self._follow(pool))
            try:
                yield pool
            finally:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following

    async def _follow(self, pool: AsyncRunnerPool) -> None:
        """Note the model of each runner, and the time of its stop."""
        async for status in pool.watch():
            for model in status.models:
                if model.pid is not None:
                    self._pids[model.pid] = self._models.name_of(model.path)
                    if model.state is ModelState.EVICTING:
                        self._note_stop(model.pid)

    def _note_stop(self, pid: int) -> None:
        self._stops.setdefault(pid, time.monotonic())

    def _callers(
        self,
        name: str,
        pool: AsyncRunnerPool,
        phase: Phase,
        count: int,
        end: float,
        *,
        is_short: bool = False,
    ) -> list[Coroutine[Any, Any, None]]:
        def lease(order: PoolOrder) -> AbstractAsyncContextManager[AsyncRunnerClient]:
            return pool.runner(
                str(self._models.paths[order.model]),
                evict=order.may_evict,
                timeout_seconds=order.timeout_seconds,
            )

        def look(model: str) -> Look:
            path, need = str(self._models.paths[model]), self._models.needs[model]
            return look_at(pool.status(), path, need)

        mixes = [
            PoolMix(
                self._models.names,
                f"{self._run.settings.seed} {phase.name} {name} {number}",
                self._models.names[number % len(self._models.names)],
                may_be_short=is_short,
            )
            for number in range(count)
        ]
        callers = [Caller(name, lease, look, mix, self._known, phase) for mix in mixes]
        return [caller.run(end) for caller in callers]

    @asynccontextmanager
    async def _plain(self, phase: Phase, env: dict[str, str]) -> AsyncIterator[Caller]:
        """Yield the caller of a plain process that has served its first request."""
        name = self._models.names[-1]

        def note(pid: int) -> None:
            self._pids[pid] = name

        model, gate = self._models.paths[name], self._gate(phase, env)
        process = PlainProcess(model, gate, env, note, self._note_stop)
        mix = PoolMix([name], f"{self._run.settings.seed} plain", name, may_be_short=True)
        caller = Caller(PROCESS, process.lease, lambda _: Look(), mix, self._known, phase)
        try:
            await caller.ask(PoolOrder(name, 0, MAX_NEW_TOKENS))
            yield caller
        finally:
            await process.close()

    def _gate(self, phase: Phase, env: dict[str, str]) -> MemoryGate:
        machine = free_memory()

        def measure() -> FreeMemory:
            held = sum(rss for _, rss, _ in watch.runners(self._process))
            free = max(0, phase.limit_bytes - held)
            return replace(machine, available_bytes=free, system_bytes=free)

        return MemoryGate(
            minimum_bytes=0, overhead_bytes=0, measure=measure, environ={**os.environ, **env}
        )


async def soak(settings: Settings, log: Path) -> PoolRun:
    """Run a pool soak.

    Args:
        settings: Settings of the soak.
        log: File that receives the log of the pools and the runners.

    Raises:
        SoakError: The load could not start.
    """
    _log_to(log)
    run = PoolRun(settings, about=describe())
    models = await asyncio.to_thread(prepare)
    known = await _known(models, settings.seed)
    samples = log.with_name("pool-samples.jsonl")
    async with watch.watching(samples):
        work = Soak(run, models, known, samples)
        await work.one_pool(settings.seconds * (1 - SHARED_SHARE))
        await work.shared(settings.seconds * SHARED_SHARE)
    run.tracebacks = count_tracebacks(log)
    return run


def look_at(status: PoolStatus, path: str, need: int) -> Look:
    """Return the state of a model in a pool.

    Args:
        status: State of the pool.
        path: Directory of the model, as it is requested.
        need: Memory that the model needs, in bytes.
    """
    model = status.model(path)
    if status.budget_bytes is None or any(each.waiting_count for each in status.models):
        room = 0
    else:
        room = status.budget_bytes - status.held_bytes
    return Look(
        is_ready=model is not None and model.state is ModelState.READY,
        has_room=need <= room,
    )


def _settings(budget_bytes: int | None) -> PoolSettings:
    return PoolSettings(
        budget_bytes=budget_bytes,
        default=ModelSettings(options=OPTIONS, keep_alive_seconds=KEEP_ALIVE_SECONDS),
        min_residence_seconds=MIN_RESIDENCE_SECONDS,
        max_wait_seconds=MAX_WAIT_SECONDS,
    )


async def _known(models: Models, seed: int) -> Known:
    """Record the answers of each model, which is alone on the machine at that time.

    Raises:
        SoakError: Two models have the same answers, which could then be mistaken for each other.
    """
    prompts, answers = known_prompts(seed), {}
    for name, path in models.paths.items():
        async with AsyncRunnerProcess(str(path), options=OPTIONS) as process:
            answers[name] = [await reference(process.client, prompt) for prompt in prompts]
    for number in range(len(prompts)):
        if len({each[number] for each in answers.values()}) < len(answers):
            raise SoakError(f"two models have the same answer to prompt {number}")
    logger.info("reference answers recorded")
    return Known(prompts, answers)


async def _together(work: list[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)


def _log_to(log: Path) -> None:
    """Send the log of the client library and of asyncio to a file."""
    handler = logging.FileHandler(log, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("runner_client", "asyncio"):
        library = logging.getLogger(name)
        library.addHandler(handler)
        library.propagate = False
