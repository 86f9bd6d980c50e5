"""The end of a server: calls refused, streams and loads ended, and the order of both."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.types import LoadSpec
from support.fakes import FakeBackend
from support.harness import Server, StartServer, eventually, failure

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_stop_ends_streams_and_frees_the_model(start_server: StartServer) -> None:
    server = await start_server()
    run = asyncio.ensure_future(server.app.run())
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    calls = [server.start(str(i)) for i in range(3)]
    await eventually(lambda: server.view.request_count == 3)
    await server.thread(server.backend.step_gate.wait_arrival)
    server.app.request_stop()
    watch = server.watch_health()
    while await anext(watch) != NOT_SERVING:
        pass
    # The step still runs: new work is refused at once, and Status answers.
    await eventually(lambda: server.view.is_stopping)
    assert (await failure(server.start())).reason == "SHUTTING_DOWN"
    assert (await failure(server.load())).reason == "SHUTTING_DOWN"
    assert (await server.status()).state == pb.STATE_STOPPING
    assert not run.done()
    server.backend.step_gate.open()
    for call in calls:
        assert (await failure(call)).reason == "SHUTTING_DOWN"
    assert await asyncio.wait_for(run, 20) == 0
    assert [name for name, _ in server.backend.calls[-2:]] == ["release", "close"]
    assert server.backend.executors[-1].closed
    await server.assert_nothing_left()


async def test_a_stop_ends_a_load(start_server: StartServer) -> None:
    server = await start_server()
    run = asyncio.ensure_future(server.app.run())
    server.backend.load_gate.shut()
    load = server.stub.Load(pb.LoadRequest(model="fake"))
    await server.thread(server.backend.load_gate.wait_arrival)
    server.app.request_stop()
    await eventually(lambda: server.view.is_stopping)
    server.backend.load_gate.open()
    assert (await failure(load)).reason == "SHUTTING_DOWN"
    assert await asyncio.wait_for(run, 20) == 0
    assert server.backend.weight_bytes == 0


async def test_a_stop_ends_a_load_that_has_not_begun(start_server: StartServer) -> None:
    server = await start_server()
    run = asyncio.ensure_future(server.app.run())
    await server.load()
    server.backend.step_gate.shut()
    call = server.start()
    await server.thread(server.backend.step_gate.wait_arrival)
    load = server.stub.Load(pb.LoadRequest(model="other"))
    await eventually(lambda: server.view.model_command is not None)
    server.app.request_stop()
    await eventually(lambda: server.view.is_stopping)
    server.backend.step_gate.open()
    assert (await failure(load)).reason == "SHUTTING_DOWN"
    assert (await failure(call)).reason == "SHUTTING_DOWN"
    assert await asyncio.wait_for(run, 20) == 0


async def test_a_step_that_hangs_does_not_hold_the_process(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runner_server.app._DRAIN_SECONDS", 0.1)
    server = await start_server()
    await server.load()
    server.backend.step_gate.shut()
    call = server.start()
    await server.thread(server.backend.step_gate.wait_arrival)
    server.app.request_stop()
    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(server.app.run(), 20)
    assert "did not end" in caplog.text
    with pytest.raises(grpc.aio.AioRpcError):
        [message async for message in call]


async def test_a_second_close_is_harmless(start_server: StartServer) -> None:
    server = await start_server()
    await server.app.close()
    await server.app.close()


async def test_the_model_of_the_command_line_is_loaded(start_server: StartServer) -> None:
    server = await start_server(load=LoadSpec("first", parallel=2))
    await eventually(lambda: server.app.engine.state().model is not None)
    status = await server.status()
    assert (status.model.name, status.parallel) == ("first", 2)


async def test_a_failed_first_model_leaves_a_server_that_says_why(
    start_server: StartServer,
) -> None:
    backend = FakeBackend(load_error=ValueError("bad"))
    server = await start_server(backend, load=LoadSpec("first"))
    await eventually(lambda: bool(server.app.engine.state().last_error))
    assert "first" in (await server.status()).last_error
    await server.load("second")
    assert await server.text(num_predict=2)


async def test_a_stop_ends_the_load_of_the_first_model(start_server: StartServer) -> None:
    backend = FakeBackend()
    backend.load_gate.shut()
    server: Server = await start_server(backend, load=LoadSpec("first"))
    run = asyncio.ensure_future(server.app.run())
    await server.thread(backend.load_gate.wait_arrival)
    server.app.request_stop()
    await eventually(lambda: server.view.is_stopping)
    backend.load_gate.open()
    assert await asyncio.wait_for(run, 20) == 0
