"""The prefix cache shrinks when the machine runs short of memory, and grows back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.headroom import MINIMUM_VARIABLE
from runner_server.engine.health import memory_pressure
from runner_server.engine.health.memory_pressure import PressureWatch
from runner_server.engine.types import EngineState, MemoryCounters, ModelInfo, State
from runner_server.errors import Busy
from runner_server.host.machine_admission import MachineAdmission
from support.fakes import model_info
from support.harness import StartServer, eventually

MIB = 1 << 20
MOST = 100 * MIB
MODEL = replace(model_info(), prefix_cache_bytes=MOST)


@dataclass
class FakeEngine:
    """Engine with a prefix cache, whose limit takes effect at once.

    Attributes:
        held: Bytes of the cache.
        limit: Limit of the cache in bytes.
        limits: Limits set, in order.
        trims: Sizes asked for by trims, in order.
        is_busy: Whether trims are refused.
    """

    held: int = 0
    limit: int = MOST
    model: ModelInfo | None = MODEL
    device: str = "cpu: fake"
    limits: list[int] = field(default_factory=list)
    trims: list[int] = field(default_factory=list)
    is_busy: bool = False

    def state(self) -> EngineState:
        """See ``Engine.state``."""
        return EngineState(State.ACTIVE, 100, self.model, 0, 0, 0, None, "")

    def memory(self) -> MemoryCounters:
        """See ``Engine.memory``."""
        return MemoryCounters(7 * MIB, MIB, 9 * MIB, self.held, self.limit)

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """See ``Engine.limit_prefix_cache``."""
        self.limits.append(limit_bytes)
        self.limit = limit_bytes
        self.held = min(self.held, limit_bytes)

    def trim(self, prefix_cache_bytes: int) -> Future[None]:
        """See ``Engine.trim``."""
        if self.is_busy:
            raise Busy
        self.trims.append(prefix_cache_bytes)
        return Future()


@dataclass
class FakeAdmission:
    """Admission with a fixed amount of spare memory.

    Attributes:
        spare: The spare memory in bytes.
        asked: Number of questions.
        noted: Bytes reported as held, in order.
    """

    spare: int = 1 << 40
    asked: int = 0
    noted: list[int] = field(default_factory=list)

    def spare_bytes(self) -> int:
        """See ``MachineAdmission.spare_bytes``."""
        self.asked += 1
        return self.spare

    def note_held(self, held_bytes: int) -> None:
        """See ``MachineAdmission.note_held``."""
        self.noted.append(held_bytes)


@pytest.fixture(autouse=True)
def measure_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure every 2 ms."""
    monkeypatch.setattr(memory_pressure, "_CPU_SECONDS", 0.002)
    monkeypatch.setattr(memory_pressure, "_GPU_SECONDS", 0.002)


@asynccontextmanager
async def watched(engine: FakeEngine, admission: FakeAdmission) -> AsyncIterator[Callable[[], Any]]:
    """Run the watch; yield a coroutine function, which waits for a new measurement."""
    stand_ins: list[Any] = [engine, admission]
    task = asyncio.create_task(PressureWatch(*stand_ins).run())

    async def measured() -> None:
        # The first measurement may have been taken before the change.
        target = admission.asked + 2
        await eventually(lambda: admission.asked >= target or task.done())
        assert not task.done()

    yield measured
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nothing_happens_while_there_is_memory() -> None:
    engine, admission = FakeEngine(held=50 * MIB), FakeAdmission()
    async with watched(engine, admission) as measured:
        await measured()
    assert (engine.limits, engine.trims) == ([], [])


async def test_the_limit_goes_down_when_memory_is_short_and_up_again() -> None:
    engine, admission = FakeEngine(held=50 * MIB), FakeAdmission(spare=-20 * MIB)
    async with watched(engine, admission) as measured:
        await eventually(lambda: bool(engine.limits))
        assert engine.limits[0] == 30 * MIB
        # Freed memory goes back to the system at once.
        assert engine.trims[0] == 30 * MIB
        admission.spare = 10 * MIB
        await measured()
        assert engine.limit == engine.held + 10 * MIB
        admission.spare = 1 << 40
        await measured()
        assert engine.limit == MOST
        await measured()
    assert engine.limits[-1] == MOST
    assert max(engine.limits) == MOST
    assert engine.limits.count(MOST) == 1


async def test_the_limit_stays_between_zero_and_the_size_of_the_load() -> None:
    engine, admission = FakeEngine(held=50 * MIB), FakeAdmission(spare=-(1 << 40))
    async with watched(engine, admission) as measured:
        await measured()
        assert (engine.limit, engine.held) == (0, 0)
        admission.spare = MOST + 1
        await measured()
    assert engine.limit == MOST
    assert all(0 <= limit <= MOST for limit in engine.limits)


async def test_room_to_grow_is_limited_by_the_spare_memory() -> None:
    """Lower the limit in advance: a cache with room grows into memory others need."""
    engine, admission = FakeEngine(held=10 * MIB), FakeAdmission(spare=5 * MIB)
    async with watched(engine, admission) as measured:
        await measured()
    assert engine.limits == [15 * MIB]
    assert not engine.trims


async def test_small_changes_are_left_alone() -> None:
    engine, admission = FakeEngine(held=10 * MIB, limit=15 * MIB), FakeAdmission(spare=5 * MIB - 9)
    async with watched(engine, admission) as measured:
        await measured()
        admission.spare = 5 * MIB + 9
        await measured()
    assert not engine.limits


async def test_a_lowered_limit_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine, admission = FakeEngine(held=50 * MIB), FakeAdmission(spare=-20 * MIB)
    async with watched(engine, admission):
        await eventually(lambda: bool(engine.limits))
    assert "memory is short: the prefix cache holds 50.0 MiB and may take 30.0 MiB" in caplog.text


@pytest.mark.parametrize("model", [None, model_info()], ids=["no model", "no prefix cache"])
async def test_nothing_is_measured_without_a_prefix_cache(model: ModelInfo | None) -> None:
    engine, admission = FakeEngine(model=model), FakeAdmission(spare=-(1 << 40))
    async with watched(engine, admission):
        await asyncio.sleep(0.05)
    assert (admission.asked, engine.limits, admission.noted) == (0, [], [])


async def test_a_trim_refused_by_a_load_does_not_end_the_watch() -> None:
    engine = FakeEngine(held=50 * MIB, is_busy=True)
    admission = FakeAdmission(spare=-20 * MIB)
    async with watched(engine, admission) as measured:
        await eventually(lambda: bool(engine.limits))
        engine.is_busy = False
        engine.held, admission.spare = 50 * MIB, -30 * MIB
        await measured()
        assert engine.trims


async def test_memory_held_on_a_gpu_is_reported() -> None:
    engine, admission = FakeEngine(device="gpu: fake", held=MIB), FakeAdmission()
    async with watched(engine, admission) as measured:
        await measured()
    assert set(admission.noted) == {8 * MIB}


async def test_the_limit_follows_free_memory_in_a_server(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use up the memory of a machine, free the memory again, and read Status."""
    monkeypatch.setenv(MINIMUM_VARIABLE, "0")
    size = 0

    def measure() -> FreeMemory:
        return FreeMemory(size, "system", size, None, None, "Some CPU", "cpu")

    server = await start_server(admission=MachineAdmission(measure=measure))
    await server.load(prefix_cache_bytes=MOST)
    limits = server.backend.prefix_cache_limits
    monkeypatch.setattr(
        type(server.backend),
        "memory",
        lambda self: MemoryCounters(0, 0, 0, 0, self.prefix_cache_limits[-1] if limits else MOST),
    )
    await eventually(lambda: limits[-1:] == [0])
    assert (await server.status()).memory_usage.prefix_cache_limit_bytes == 0
    size = 2 * MOST
    await eventually(lambda: limits[-1] == MOST)
    status = await server.status()
    assert status.memory_usage.prefix_cache_limit_bytes == MOST
    assert status.state == pb.STATE_ACTIVE
    await server.stub.Unload(pb.UnloadRequest())
    seen = len(limits)
    size = 0
    await asyncio.sleep(0.05)
    assert len(limits) == seen


async def test_a_watch_that_fails_is_logged_and_the_server_goes_on(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_watch: object) -> None:
        raise OSError("no /proc here")

    monkeypatch.setattr("runner_server.engine.health.memory_pressure.PressureWatch.run", broken)
    server = await start_server()
    await eventually(lambda: "the server goes on without it" in caplog.text)
    assert "no /proc here" in caplog.text
    await server.load()
    assert await server.text(num_predict=2)
