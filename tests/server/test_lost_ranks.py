"""A server with a part of a model: the status of other ranks, and the loss of one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.app import EXIT_ENGINE_DEAD, RunnerApp
from runner_server.config import ServerConfig
from runner_server.engine.backend import BackendLost
from runner_server.engine.engine import Engine
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.request import RequestStatus
from runner_server.engine.types import CompletionSpec, LoadSpec, MemoryCounters, Rank
from runner_server.errors import RunnerFault
from support.fakes import DEADLINE_SECONDS, FakeBackend
from support.harness import LIMITS, Server, eventually, failure

OTHER = Rank(1, "there", 4711, "cpu: fake", MemoryCounters(5, 6, 7, 1), 8, 9)


class FakeRanks:
    """Ranks with one other rank."""

    others: Sequence[Rank] = (OTHER,)
    on_lost: Callable[[str], object]
    on_stop: Callable[[], object]

    def watch(self, on_lost: Callable[[str], object], on_stop: Callable[[], object]) -> None:
        """See ``Ranks.watch``."""
        self.on_lost, self.on_stop = on_lost, on_stop


@pytest.fixture
def other() -> FakeRanks:
    """The ranks watched by the server."""
    return FakeRanks()


@pytest.fixture
async def first(socket_dir: Path, other: FakeRanks) -> AsyncIterator[Server]:
    """Rank 0 with a model."""
    backend = FakeBackend()
    app = RunnerApp(ServerConfig(listen=f"unix:{socket_dir}/s"), backend, other)
    ready = await app.start()
    async with grpc.aio.insecure_channel(ready.target, options=LIMITS) as channel:
        server = Server(app, backend, channel, ready)
        await server.load()
        yield server
    backend.open_gates()
    await app.close()
    # ``close`` does not wait for a lost rank's engine; this one does not hang, and needs the loop.
    await asyncio.to_thread(app.engine._thread.join)


async def test_status_names_all_ranks(first: Server) -> None:
    status = await first.status()
    own, other = status.ranks
    assert (own.rank, own.pid, own.device) == (0, status.pid, status.device)
    assert own.memory_usage == status.memory_usage
    usage = pb.MemoryUsage(
        active_bytes=5,
        cache_bytes=6,
        peak_bytes=7,
        process_bytes=8,
        limit_bytes=9,
        prefix_cache_bytes=1,
    )
    assert other == pb.Rank(rank=1, host="there", pid=4711, device="cpu: fake", memory_usage=usage)


async def test_a_server_with_the_whole_model_names_no_ranks(server: Server) -> None:
    assert not (await server.status()).ranks


async def test_a_lost_rank_ends_all_calls_even_while_a_step_hangs(
    first: Server, other: FakeRanks
) -> None:
    first.backend.step_gate.shut()
    calls = [first.start("number 0", num_predict=50)]
    await first.thread(first.backend.step_gate.wait_arrival)
    calls += [first.start(f"number {i}", num_predict=50) for i in range(1, 6)]
    await eventually(lambda: first.app.engine.state().queued_count == 5)
    await first.thread(lambda: other.on_lost("rank 1 is gone"))
    for problem in await asyncio.gather(*map(failure, calls)):
        assert problem.code is grpc.StatusCode.UNAVAILABLE
        assert (problem.reason, problem.message) == ("SHUTTING_DOWN", "rank 1 is gone")
    assert (await failure(first.start("late"))).reason == "SHUTTING_DOWN"
    status = await first.status()
    assert (status.state, status.last_error) == (pb.STATE_FAILED, "rank 1 is gone")
    assert await first.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await first.app.run() == EXIT_ENGINE_DEAD


async def test_requests_of_a_lost_rank_are_failed_on_the_engine_thread(
    first: Server, other: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, threads = GenerationRequest.fail, list[str]()

    def noting(request: GenerationRequest, fault: RunnerFault) -> None:
        threads.append(threading.current_thread().name)
        fail(request, fault)

    monkeypatch.setattr(GenerationRequest, "fail", noting)
    first.backend.step_gate.shut()
    calls = [first.start(f"number {i}", num_predict=50) for i in range(6)]
    await first.thread(first.backend.step_gate.wait_arrival)
    await eventually(lambda: first.view.request_count == 6)
    requests = list(first.view.requests)
    await first.thread(lambda: other.on_lost("rank 1 is gone"))
    for problem in await asyncio.gather(*map(failure, calls)):
        assert problem.message == "rank 1 is gone"
    # The engine thread still hangs in the step.
    assert not threads
    assert RequestStatus.FINISHED not in {request.status for request in requests}
    status = await first.status()
    assert (status.running_count, status.queued_count) == (0, 0)
    assert not status.HasField("last_progress_age")
    first.backend.step_gate.open()
    await first.thread(first.app.engine._thread.join)
    assert threads == ["engine"] * 6
    assert {request.status for request in requests} == {RequestStatus.FINISHED}
    assert not first.view.requests


def test_an_engine_thread_that_outlives_the_event_loop_ends_quietly() -> None:
    backend = FakeBackend()

    async def lose() -> Engine:
        engine = Engine(backend, max_queued=5, on_death=lambda: None)
        engine.start()
        load = engine.load(LoadSpec("m"))
        await asyncio.wrap_future(load.future)
        backend.step_gate.shut()
        engine.submit(engine.model(), CompletionSpec((1,), 5))
        await asyncio.to_thread(backend.step_gate.wait_arrival)
        engine.lose("the engine has made no progress")
        assert await engine.wait_ended(0)
        return engine

    engine = asyncio.run(lose())
    backend.step_gate.open()
    engine._thread.join(DEADLINE_SECONDS)
    assert backend.calls[-1] == ("close", "engine")


async def test_a_lost_rank_ends_a_load(first: Server, other: FakeRanks) -> None:
    first.backend.load_gate.shut()
    call = first.stub.Load(pb.LoadRequest(model="next"))
    await first.thread(first.backend.load_gate.wait_arrival)
    await first.thread(lambda: other.on_lost("rank 1 is gone"))
    problem = await failure(call)
    assert (problem.reason, problem.message) == ("SHUTTING_DOWN", "rank 1 is gone")
    first.backend.load_gate.open()
    await first.thread(first.app.engine._thread.join)
    assert (await first.status()).state == pb.STATE_FAILED


async def test_a_step_that_finds_a_rank_lost_ends_the_process(first: Server) -> None:
    first.backend.failures.append(BackendLost("rank 1 is gone"))
    problem = await failure(first.start())
    assert (problem.reason, problem.message) == ("SHUTTING_DOWN", "rank 1 is gone")
    assert await first.app.run() == EXIT_ENGINE_DEAD


async def test_a_load_that_finds_a_rank_lost_ends_the_process(first: Server) -> None:
    first.backend.load_error = BackendLost("rank 1 is gone")
    problem = await failure(first.stub.Load(pb.LoadRequest(model="next")))
    assert (problem.reason, problem.message) == ("SHUTTING_DOWN", "rank 1 is gone")
    assert await first.app.run() == EXIT_ENGINE_DEAD


async def test_a_stop_requested_by_a_rank_stops_the_server(first: Server, other: FakeRanks) -> None:
    await first.thread(other.on_stop)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await first.app.run() == 0
