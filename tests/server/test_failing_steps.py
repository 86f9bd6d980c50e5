"""A failed step ends the requests of the batch; two in a row end the process."""

from __future__ import annotations

import asyncio
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.work import DecodeItem, WorkItem, WorkReport
from support.fakes import FakeBackend, FakeExecutor
from support.harness import (
    CompletionCall,
    Problem,
    Server,
    StartServer,
    eventually,
    failure,
    problem_of,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_failed_step_costs_its_batch_and_the_queue_is_served(server: Server) -> None:
    await server.load(parallel=2)
    gate = server.backend.step_gate
    gate.shut()
    calls = [server.start(f"prompt {i}", num_predict=4) for i in range(5)]
    await eventually(lambda: server.view.request_count == 5)
    gate.allow()
    await server.thread(lambda: gate.wait_passed(1))
    await server.thread(gate.wait_arrival)
    server.backend.failures.append(RuntimeError("[metal] secret path /home"))
    gate.open()
    ends = await asyncio.gather(*(_outcome(call) for call in calls))
    problems = [end for end in ends if isinstance(end, Problem)]
    assert len(problems) == 2
    assert [end for end in ends if isinstance(end, int)] == [4, 4, 4]
    for problem in problems:
        assert (problem.code, problem.reason) == (grpc.StatusCode.INTERNAL, "GENERATION_FAILED")
        assert "RuntimeError" in problem.message
        assert "secret" not in problem.message
    status = await server.status()
    assert status.state == pb.STATE_ACTIVE
    assert "RuntimeError" in status.last_error
    # The failed batch is replaced: the library may have lost rows that it had split off.
    assert len(server.backend.executors) == 2
    assert server.backend.executors[0].closed
    await server.assert_nothing_left()


async def test_failed_steps_that_are_not_in_a_row_are_survived(loaded: Server) -> None:
    for _ in range(5):
        loaded.backend.failures.append(RuntimeError())
        assert (await failure(loaded.start())).reason == "GENERATION_FAILED"
        assert await loaded.text(num_predict=2)
    assert (await loaded.status()).state == pb.STATE_ACTIVE


async def test_an_error_while_adding_a_row_is_a_failed_step(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> None:
        raise ValueError

    executor = loaded.backend.executors[-1]
    monkeypatch.setattr(executor, "add", broken)
    assert (await failure(loaded.start())).reason == "GENERATION_FAILED"
    assert await loaded.text(num_predict=2)


async def test_two_failed_steps_in_a_row_end_the_process(start_server: StartServer) -> None:
    server = await start_server()
    run = asyncio.ensure_future(server.app.run())
    await server.load(parallel=2)
    watch = server.watch_health("plugin")
    assert await anext(watch) == SERVING
    server.backend.step_gate.shut()
    calls = [server.start(f"prompt {i}") for i in range(6)]
    await eventually(lambda: server.view.request_count == 6)
    server.backend.failures += [RuntimeError("first"), RuntimeError("second")]
    server.backend.step_gate.open()
    problems = await asyncio.gather(*(failure(call) for call in calls))
    assert {problem.reason for problem in problems} == {"GENERATION_FAILED"}
    assert await anext(watch) == NOT_SERVING
    assert await asyncio.wait_for(run, 20) == 70
    assert server.backend.steps == 2
    # The backend closes before the process ends, or the exit may abort.
    assert server.backend.calls[-1] == ("close", "engine")


async def test_decode_steps_that_fail_after_each_prefill_end_the_process(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start_server()
    run = asyncio.ensure_future(server.app.run())
    await server.load(parallel=2)
    run_item = FakeExecutor.run

    def broken(executor: FakeExecutor, item: WorkItem) -> WorkReport:
        if isinstance(item, DecodeItem):
            raise RuntimeError("every decode step fails")  # noqa: TRY004 - as MLX does
        return run_item(executor, item)

    monkeypatch.setattr(FakeExecutor, "run", broken)
    for _ in range(2):
        assert (await failure(server.start())).reason == "GENERATION_FAILED"
    assert await asyncio.wait_for(run, 20) == 70
    assert server.backend.steps == 2


async def test_a_dead_engine_answers_with_a_typed_error(start_server: StartServer) -> None:
    server = await start_server()
    await server.load()
    server.backend.failures += [RuntimeError(), RuntimeError()]
    await failure(server.start())
    await failure(server.start())
    status = await server.status()
    assert status.state == pb.STATE_FAILED
    assert "failed" in status.last_error
    for call in (server.start(), server.load(), server.stub.Unload(pb.UnloadRequest())):
        assert (await failure(call)).reason == "SHUTTING_DOWN"
    assert status.progress == 0
    for name in ("", "plugin", "mlxrunner.v1.RunnerService"):
        await eventually(partial(_is_not_serving, server, name))


async def test_the_process_ends_if_its_library_cannot_be_opened(
    start_server: StartServer,
) -> None:
    backend = FakeBackend(open_error=ImportError("no mlx here"))
    server = await start_server(backend)
    assert await asyncio.wait_for(server.app.run(), 20) == 70
    assert "no mlx here" in server.app.engine.state().last_error


async def test_a_waiting_load_ends_when_the_engine_dies(start_server: StartServer) -> None:
    backend = FakeBackend(open_error=ImportError("no mlx here"))
    server = await start_server(backend)
    assert (await failure(server.load())).reason == "SHUTTING_DOWN"


async def _outcome(call: CompletionCall) -> int | Problem:
    try:
        return [message async for message in call][-1].eval_count
    except grpc.aio.AioRpcError as error:
        return problem_of(error)


async def _is_not_serving(server: Server, name: str) -> bool:
    return await server.health(name) == NOT_SERVING


async def test_a_failed_cancel_costs_only_its_batch(start_server: StartServer) -> None:
    server = await start_server()
    await server.load()
    server.backend.step_gate.shut()
    cancelled, neighbour = server.start("one"), server.start("two")
    await eventually(lambda: server.view.request_count == 2)
    server.backend.step_gate.allow(2)
    await eventually(lambda: server.backend.steps == 2)
    server.backend.remove_failures.append(RuntimeError("cannot filter"))
    cancelled.cancel()
    await eventually(lambda: server.view.command_count > 0)
    server.backend.step_gate.open()
    assert (await failure(neighbour)).reason == "GENERATION_FAILED"
    assert (await server.complete("three", num_predict=3))[-1].done
    await server.settled()
    await server.assert_nothing_left()
