"""A server notices when its engine stands still, and ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.health.stall_watchdog import EXIT_STALLED, StallWatchdog
from support.harness import Server, StartServer, failure


class WatchedEngine:
    """Watchdog of an engine and a processor clock, both set by the test."""

    def __init__(self) -> None:
        self.state: Any = SimpleNamespace(
            last_progress_age=None, step_count=1, running_count=2, queued_count=0
        )
        self.engine = self._engine()
        self.cpu_seconds = 0.0
        self.reports: list[str] = []
        self.watch = StallWatchdog(self.engine, 10.0, self.reports.append, lambda: self.cpu_seconds)

    def _engine(self) -> Any:
        return SimpleNamespace(device="cpu: fake", state=lambda: self.state)

    def look(self, now: float, age: float | None, cpu: float = 0.0, steps: int = 1) -> bool:
        """Check an engine without progress for ``age`` seconds."""
        self.state.last_progress_age, self.state.step_count = age, steps
        self.cpu_seconds = cpu
        return self.watch.look(now)


def test_an_engine_is_stalled_after_two_checks() -> None:
    watched = WatchedEngine()
    assert not watched.look(0, 11)
    assert watched.look(2, 13)
    assert "made no progress for 13 s with 2 running" in watched.reports[0]


@pytest.mark.parametrize("age", [None, 3.0])
def test_an_engine_that_advances_or_is_idle_is_left_alone(age: float | None) -> None:
    watched = WatchedEngine()
    assert not any([watched.look(0, 11), watched.look(2, age), watched.look(4, 12)])
    assert watched.reports == []


def test_a_step_between_checks_counts_as_progress() -> None:
    watched = WatchedEngine()
    assert not any([watched.look(0, 11), watched.look(2, 11, steps=2)])


def test_a_step_that_uses_processor_time_is_only_slow_on_a_cpu() -> None:
    slow = [WatchedEngine(), WatchedEngine()]
    for now in range(0, 100, 2):
        assert not slow[0].look(now, 11 + now, cpu=1.5 * now)
    # A GPU computes without processor time.
    slow[1].engine.device = "gpu: fake"
    assert not slow[1].look(0, 11, cpu=0)
    assert slow[1].look(2, 13, cpu=3)


async def hanging(start_server: StartServer, **config: Any) -> tuple[Server, asyncio.Future[int]]:
    """Start a server whose engine hangs in a step."""
    server = await start_server(**config)
    run = asyncio.ensure_future(server.app.run())
    await server.load()
    server.backend.step_gate.shut()
    return server, run


async def test_calls_end_and_the_process_exits_with_its_own_code(
    start_server: StartServer,
) -> None:
    server, run = await hanging(start_server, stall_seconds=0.2)
    problem = await failure(server.start())
    assert (problem.reason, "made no progress" in problem.message) == ("SHUTTING_DOWN", True)
    assert await run == EXIT_STALLED == 71


async def test_status_reports_the_stall(start_server: StartServer) -> None:
    server, run = await hanging(start_server, stall_seconds=0.2)
    seen: list[pb.StatusResponse] = []
    lose = server.app.engine.lose

    def note(text: str) -> None:
        lose(text)
        seen.append(server.app.engine.state())  # type: ignore[arg-type]  # has the same names

    server.app.engine.lose = note  # type: ignore[method-assign]  # to look in between
    await failure(server.start())
    await run
    assert "made no progress" in seen[0].last_error


async def test_zero_turns_the_watchdog_off(start_server: StartServer) -> None:
    server, run = await hanging(start_server, stall_seconds=0)
    call = server.start()
    await server.thread(server.backend.step_gate.wait_arrival)
    assert len(server.app._tasks) == 1  # the watch of free memory alone
    server.backend.open_gates()
    call.cancel()
    server.app.request_stop()
    assert await run == 0
