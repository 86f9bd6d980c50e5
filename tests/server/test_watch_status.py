"""WatchStatus: messages at once, after changes and at the interval, and an end with a reason."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.status_watch import states
from runner_server.engine.engine import Engine
from runner_server.engine.types import EngineState
from support.fakes import DEADLINE_SECONDS
from support.harness import Server, StartServer, eventually, failure

_QUIET_SECONDS = 0.3
"""Time in which a watch without a reason to send would have sent many messages."""


@dataclass
class Watch:
    """A watch and its messages."""

    call: grpc.aio.UnaryStreamCall[pb.WatchStatusRequest, pb.WatchStatusResponse]
    seen: list[pb.StatusResponse] = field(default_factory=list)

    async def next(self) -> pb.StatusResponse:
        """Wait for a message."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            message = await self.call.read()
        assert isinstance(message, pb.WatchStatusResponse), "the stream ended"
        self.seen.append(message.status)
        return message.status

    async def until(self, **values: Any) -> pb.StatusResponse:
        """Read up to the first message with these values."""
        status = await self.next()
        while any(getattr(status, name) != value for name, value in values.items()):
            status = await self.next()
        return status


def watch(server: Server, interval_seconds: float | None = None) -> Watch:
    request = pb.WatchStatusRequest()
    if interval_seconds is not None:
        request.interval.FromMilliseconds(round(interval_seconds * 1000))
    return Watch(server.stub.WatchStatus(request))


def watcher_count(server: Server) -> int:
    return len(server.app.engine._changes._watchers)


async def test_the_first_message_is_the_status(loaded: Server) -> None:
    status = await watch(loaded).next()
    assert (status.state, status.progress, status.model.name) == (pb.STATE_ACTIVE, 100, "fake")
    same = await loaded.status()
    for each in (status, same):
        # Resident memory and the uptime change between two reads.
        each.ClearField("uptime_duration")
        each.ClearField("memory_usage")
    assert status == same


async def test_a_load_is_reported_step_by_step(server: Server) -> None:
    watched = watch(server)
    assert (await watched.next()).state == pb.STATE_IDLE
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load())
    await server.thread(server.backend.load_gate.wait_arrival)
    assert (await watched.until(state=pb.STATE_LOADING)).progress == 0
    for percent in (20, 40, 60):
        server.backend.load_gate.allow(2 if percent == 20 else 1)
        status = await watched.until(progress=percent)
        assert (status.state, status.HasField("model")) == (pb.STATE_LOADING, False)
    server.backend.load_gate.open()
    await load
    assert (await watched.until(state=pb.STATE_ACTIVE)).model.name == "fake"
    await server.stub.Unload(pb.UnloadRequest())
    status = await watched.until(state=pb.STATE_IDLE)
    assert (status.progress, status.HasField("model")) == (0, False)


async def test_a_failed_load_is_reported_with_its_error(server: Server) -> None:
    server.backend.load_error = RuntimeError("no")
    watched = watch(server)
    await watched.next()
    await failure(server.load())
    status = await watched.until(state=pb.STATE_IDLE, progress=0)
    while not status.last_error:
        status = await watched.next()
    assert "fake" in status.last_error


async def test_running_and_queued_completions_are_counted(server: Server) -> None:
    await server.load(parallel=1)
    watched = watch(server)
    await watched.next()
    server.backend.step_gate.shut()
    first = server.start(num_predict=1)
    await watched.until(running_count=1, queued_count=0)
    second = server.start(num_predict=1)
    await watched.until(running_count=1, queued_count=1)
    second.cancel()
    server.backend.step_gate.open()
    assert [message async for message in first][-1].done
    await watched.until(running_count=0, queued_count=0)


async def test_a_drain_and_its_cancellation_are_reported(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    running = loaded.start()
    watched = watch(loaded)
    await watched.until(running_count=1)
    drain = loaded.stub.Drain(pb.DrainRequest())
    await watched.until(state=pb.STATE_DRAINING)
    drain.cancel()
    await watched.until(state=pb.STATE_ACTIVE)
    running.cancel()


async def test_an_aborted_completion_is_reported(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start(request_id="one")
    watched = watch(loaded)
    await watched.until(running_count=1)
    await loaded.stub.Abort(pb.AbortRequest(request_ids=["one"]))
    loaded.backend.step_gate.open()
    await watched.until(running_count=0)
    assert (await failure(call)).reason == "ABORTED"


async def test_a_step_that_hangs_does_not_delay_a_watch(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start()
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    watched = watch(loaded, 0.1)
    first, second = await watched.next(), await watched.next()
    assert first.running_count == second.running_count == 1
    ages = [status.last_progress_age.ToNanoseconds() for status in (first, second)]
    assert ages[0] < ages[1]
    call.cancel()


async def test_without_changes_nothing_is_sent_or_computed(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch(loaded)
    await watched.next()
    reads = 0
    state = Engine.state

    def counting(engine: Engine) -> EngineState:
        nonlocal reads
        reads += 1
        return state(engine)

    monkeypatch.setattr(Engine, "state", counting)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(_QUIET_SECONDS):
            await watched.call.read()
    assert reads == 0


async def test_an_interval_repeats_the_status(loaded: Server) -> None:
    watched = watch(loaded, 0.1)
    began = time.monotonic()
    for _ in range(4):
        await watched.next()
    # Three intervals lie between four messages.
    assert 0.3 <= time.monotonic() - began < DEADLINE_SECONDS


async def test_many_changes_are_merged(loaded: Server) -> None:
    watched = watch(loaded)
    await watched.next()
    began = time.monotonic()
    reader = asyncio.ensure_future(watched.until(last_error="the end"))
    for _ in range(100):
        await loaded.text(num_predict=1)
    loaded.app.engine._registry.note_error("the end")
    await reader
    assert len(watched.seen) <= 3 + 20 * (time.monotonic() - began)
    assert watched.seen[-1].running_count == 0


async def test_a_slow_reader_gets_the_newest_state(loaded: Server) -> None:
    engine = loaded.app.engine
    async with aclosing(states(engine, None)) as reports:
        await anext(reports)
        for number in range(1000):
            engine._registry.note_error(f"error {number}")
        assert (await anext(reports)).last_error == "error 999"
        assert await loaded.text(num_predict=1)
        unread = asyncio.ensure_future(anext(reports))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(unread, _QUIET_SECONDS)


async def test_a_cancelled_watch_leaves_nothing(loaded: Server) -> None:
    watches = [watch(loaded) for _ in range(5)]
    for each in watches:
        await each.next()
    assert watcher_count(loaded) == 5
    for each in watches:
        each.call.cancel()
    await eventually(lambda: watcher_count(loaded) == 0)


async def test_a_deadline_ends_a_watch(loaded: Server) -> None:
    call = loaded.stub.WatchStatus(pb.WatchStatusRequest(), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: watcher_count(loaded) == 0)


async def test_a_stop_is_reported_before_the_end(start_server: StartServer) -> None:
    server = await start_server()
    run = asyncio.ensure_future(server.app.run())
    await server.load()
    idle, busy = watch(server), watch(server, 0.1)
    await idle.next()
    await busy.next()
    server.app.request_stop()
    for watched in (idle, busy):
        problem = await failure(_read_all(watched))
        assert (problem.code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert watched.seen[-1].state == pb.STATE_STOPPING
        assert [status.state for status in watched.seen].count(pb.STATE_STOPPING) == 1
    assert await asyncio.wait_for(run, DEADLINE_SECONDS) == 0


async def test_a_stop_is_reported_while_a_step_hangs(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start()
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    watched = watch(loaded)
    await watched.next()
    loaded.app.engine.stop()
    await watched.until(state=pb.STATE_STOPPING)
    assert (await failure(_read_all(watched))).reason == "SHUTTING_DOWN"
    assert not call.done()


async def test_a_dead_engine_is_reported_before_the_end(loaded: Server) -> None:
    watched = watch(loaded)
    await watched.next()
    loaded.backend.failures += [RuntimeError("one"), RuntimeError("two")]
    for _ in range(2):
        await failure(loaded.start())
    problem = await failure(_read_all(watched))
    assert (problem.code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert watched.seen[-1].state == pb.STATE_FAILED
    assert watched.seen[-1].last_error


async def _read_all(watched: Watch) -> None:
    while True:
        await watched.next()
