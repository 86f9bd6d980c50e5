"""A machine whose runners exist in memory only, for tests of a pool's faults and races.

The pool, its gate and its decisions are real; a test decides when a load or a stop ends, how a
load fails, and how much memory is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner_client import (
    AsyncRunnerPool,
    LoadOptions,
    MemoryGate,
    ModelState,
    PoolModel,
    PoolSettings,
)
from runner_client.errors import RunnerExitedError, RunnerUnavailableError
from runner_client.memory.estimation import BARE_PROCESS_BYTES, MemoryEstimate, estimate
from runner_client.memory.model import find_model
from runner_common.host_memory.free import FreeMemory
from support.fake_child import write_model

ONE, TWO = 235_000_000, 470_000_000
"""Budgets for one and for two models of ``Machine.model``."""


@dataclass
class Behaviour:
    """What the runners of a model do.

    Attributes:
        may_load: Loads wait for it.
        may_stop: Stops wait for it, unless cancelled.
        loads: How the next loads end: an error to raise, an event to wait for, or None.
        cache_bytes: Size of the prefix cache, which a trim empties.
    """

    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    may_stop: asyncio.Event = field(default_factory=asyncio.Event)
    loads: deque[Exception | asyncio.Event | None] = field(default_factory=deque)
    cache_bytes: int = 0


@dataclass
class Machine:
    """Memory and runners.

    Attributes:
        folder: Where the models are.
        total_bytes: Memory that runners and others can have.
        outside_bytes: Memory of others.
        lost_bytes: Memory that stopped runners did not give back.
        processes: Every runner created so far.
        before_measuring: Called before each measurement, in its thread.
        behaviours: What the runners of each model do, by directory.
        spare: What spare processes do; ``may_load`` and ``loads`` apply to their starts.
    """

    folder: Path
    total_bytes: int = 100 * 2**30
    outside_bytes: int = 0
    lost_bytes: int = 0
    processes: list[FakeProcess] = field(default_factory=list)
    before_measuring: Callable[[], None] = lambda: None
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    spare: Behaviour = field(default_factory=Behaviour)

    def __post_init__(self) -> None:
        self.spare.may_load.set()
        self.spare.may_stop.set()

    def model(self, name: str) -> str:
        """Return the directory of a model whose loads and stops take no time."""
        path = self.folder / name
        if not path.exists():
            write_model(path)
            behaviour = self.behaviours[str(path)] = Behaviour()
            behaviour.may_load.set()
            behaviour.may_stop.set()
        return str(path)

    def of(self, model: str) -> Behaviour:
        """Return what the runners of a model do."""
        return self.behaviours[str(find_model(model).path)]

    def runners(self, model: str) -> list[FakeProcess]:
        """Return the runners that were created for a model."""
        return [each for each in self.processes if each.path == str(find_model(model).path)]

    @property
    def spares(self) -> list[FakeSpare]:
        """Every spare process that was created, taken or not."""
        return [each for each in self.processes if isinstance(each, FakeSpare)]

    @property
    def held_bytes(self) -> int:
        """Memory of the runners that run."""
        return sum(each.memory_size for each in self.processes if each.is_running)

    def measure(self) -> FreeMemory:
        """Measure free memory."""
        self.before_measuring()
        used = self.outside_bytes + self.lost_bytes + self.held_bytes
        free = max(0, self.total_bytes - used)
        return FreeMemory(free, "system", free, None, None, "test", "cpu")

    @contextlib.asynccontextmanager
    async def pool(
        self, *, min_residence_seconds: float = 0.0, policy: Any = None, **settings: Any
    ) -> AsyncIterator[AsyncRunnerPool]:
        """Open a pool on this machine, and check that it leaves no runner and no task."""
        before = asyncio.all_tasks()
        given = PoolSettings(min_residence_seconds=min_residence_seconds, **settings)
        async with AsyncRunnerPool(given, gate=self.gate(), restart_policy=policy) as pool:
            try:
                yield pool
            except BaseException:
                # The pool could not close, and would hide why the test has failed.
                self._let_all_go_on()
                raise
        assert not [each for each in self.processes if each.is_running]
        assert asyncio.all_tasks() == before

    def _let_all_go_on(self) -> None:
        for behaviour in (*self.behaviours.values(), self.spare):
            behaviour.may_load.set()
            behaviour.may_stop.set()

    def gate(self) -> MemoryGate:
        """Return a gate that measures this machine."""
        return MemoryGate(measure=self.measure, minimum_bytes=0, settle_seconds=0)


class FakeProcess:
    """The part of ``AsyncRunnerProcess`` that a pool uses."""

    _pids = itertools.count(2**30)

    def __init__(self, machine: Machine, path: str, options: LoadOptions) -> None:
        self._machine = machine
        self.path = path
        self.options = options
        self.pid: int | None = None
        self.address = "127.0.0.1:1"
        self.token: str | None = None
        self.peer = None
        self.is_running = False
        self.is_stopping = False
        self.memory_size = 0
        self.cache_bytes = self.behaviour.cache_bytes if path else 0
        self.trims = 0
        self.estimate: MemoryEstimate | None = None
        self.exit_error: RunnerExitedError | None = None
        self._on_exit: list[Callable[[], None]] = []
        machine.processes.append(self)

    @property
    def behaviour(self) -> Behaviour:
        """What the runners of this model do."""
        return self._machine.of(self.path)

    @property
    def device_infos(self) -> tuple[Any, ...]:
        """The device: a GPU, whose memory the runner reports."""
        return (SimpleNamespace(kind="gpu"),)

    @property
    def client(self) -> Any:
        """The client: the process itself, which has its calls."""
        assert self.is_running, "a lease of a runner that does not run"
        return self

    async def load(self) -> MemoryEstimate:
        """Start the runner."""
        await asyncio.sleep(0)
        self.estimate = estimate(self.path, options=self.options)
        self.pid = next(self._pids)
        self.is_running = True
        self.memory_size = self.estimate.required_bytes
        return self.estimate

    async def wait_until_running(self, note: Callable[[Any], None]) -> None:
        """Wait for the load."""
        note(SimpleNamespace(progress=50))
        await self.behaviour.may_load.wait()
        end = self.behaviour.loads.popleft() if self.behaviour.loads else None
        if isinstance(end, Exception):
            raise end
        if end is not None:
            await end.wait()

    async def status(self, *, timeout_seconds: float | None = None) -> Any:
        """Return the memory of the runner."""
        assert timeout_seconds is None or timeout_seconds > 0
        usage = SimpleNamespace(reserved_bytes=0, prefix_cache_bytes=self.cache_bytes)
        return SimpleNamespace(
            memory_usage=usage, device="gpu: test", memory_bytes=self.memory_size
        )

    async def trim(self, **_: Any) -> int:
        """Empty the prefix cache."""
        self.trims += 1
        freed, self.cache_bytes = self.cache_bytes, 0
        return freed

    async def close(self) -> None:
        """Stop the runner; a cancellation kills it."""
        self.is_stopping = True
        try:
            if self.is_running:
                await self.behaviour.may_stop.wait()
        finally:
            self._exit()

    def kill(self) -> None:
        """Kill the runner, whose close then takes no time."""
        self.is_running = False

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Call a function at the exit."""
        self._on_exit.append(callback)

    def die(self) -> None:
        """Die as if killed."""
        self.exit_error = RunnerExitedError(
            "the runner is gone: killed by SIGKILL",
            exit_code=-9,
            exit_reason="killed by SIGKILL",
            stderr_tail=(),
            last_memory_bytes=None,
        )
        self._exit()

    def _exit(self) -> None:
        self.is_running = False
        callbacks, self._on_exit = self._on_exit, []
        for callback in callbacks:
            callback()


class FakeSpare(FakeProcess):
    """The part of ``SpareProcess`` that a pool uses; a load always runs in it if it has started."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, "", LoadOptions())
        self._starting = asyncio.Lock()

    @property
    def behaviour(self) -> Behaviour:
        """Behaviour of this process, as a spare one or with a model."""
        return super().behaviour if self.path else self._machine.spare

    @property
    def is_reserved(self) -> bool:
        """Whether it runs."""
        return self.token is not None

    async def start(self) -> None:
        """Start without a model."""
        async with self._starting:
            self.pid = next(self._pids)
            self.is_running, self.token = True, "a token"
            self.memory_size = BARE_PROCESS_BYTES
            try:
                await self._begin()
            except BaseException:
                self._exit()
                raise

    async def _begin(self) -> None:
        behaviour = self._machine.spare
        await eventually(lambda: behaviour.may_load.is_set() or not self.is_running)
        end = behaviour.loads.popleft() if behaviour.loads else None
        if isinstance(end, Exception):
            raise end
        if not self.is_running:
            raise RunnerUnavailableError("the runner was closed while it was starting")

    def choose(self, model: str, options: LoadOptions) -> None:
        """Name the model to load."""
        self.path, self.options = str(find_model(model).path), options

    async def load(self) -> MemoryEstimate:
        """Load the model once the process has started, in a new one if it is gone."""
        async with self._starting:
            if self.is_running:
                pid = self.pid
                found = await super().load()
                self.pid = pid
                return found
        return await super().load()


def use_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Machine:
    """Make pools start runners on a machine in memory."""
    machine = Machine(folder)

    def new_process(model: str, *, options: LoadOptions, **_: object) -> FakeProcess:
        return FakeProcess(machine, str(find_model(model).path), options)

    def new_spare(**_: object) -> FakeSpare:
        return FakeSpare(machine)

    monkeypatch.setattr("runner_client.memory.estimation.can_ask", lambda: False)
    monkeypatch.setattr("runner_client.pool.aio_pool.AsyncRunnerProcess", new_process)
    monkeypatch.setattr("runner_client.pool.aio_pool.SpareProcess", new_spare)
    return machine


async def eventually(is_true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let other tasks run until ``is_true`` returns True."""
    async with asyncio.timeout(seconds):
        while not is_true():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.005)


def state_of(pool: AsyncRunnerPool, model: str) -> ModelState:
    """Return the state of a model, requested or not."""
    found = pool.status().model(model)
    return found.state if found else ModelState.ABSENT


def reason_of(pool: AsyncRunnerPool, model: str) -> str:
    """Return why a request for a model waits; empty if there is none."""
    found = pool.status().model(model)
    return found.reason if found else ""


def model_of(pool: AsyncRunnerPool, model: str) -> PoolModel:
    """Return the description of a model."""
    found = pool.status().model(model)
    assert found is not None
    return found


async def use(pool: AsyncRunnerPool, model: str) -> int | None:
    """Lease a model and release it; return the pid of its runner."""
    async with pool.runner(model):
        return model_of(pool, model).pid
