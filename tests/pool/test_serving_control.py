"""The server of a pool: control of models, tokens, TLS, metrics and the end."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mlxrunner.v1 import pool_pb2
from mlxrunner.v1 import runner_pb2 as pb
from runner_client.errors import RequestAbortedError
from runner_client.pool.serving.app import PoolApp
from runner_client.pool.serving.completions import Completions
from runner_client.pool.serving.config import PoolServerConfig
from runner_client.pool.serving.forward import Forwarder
from runner_common.serving.tls import TlsFiles
from support.certificates import Authority
from support.command_line import invoke
from support.harness import eventually, failure
from support.pool_server import (
    CONTEXT,
    PoolServer,
    broken,
    has_state,
    is_idle,
    serving,
    settings,
)

pytestmark = [pytest.mark.mlx, pytest.mark.slow]

Code = grpc.StatusCode


async def test_models_are_evicted_pinned_and_watched(one: Path) -> None:
    name = str(one)
    async with serving(one) as server:
        watch: Any = server.pool.Watch(pool_pb2.WatchRequest())
        first = (await watch.read()).pool
        assert [model.name for model in first.models] == [name]
        seen: list[pool_pb2.PoolModel] = []
        watching = asyncio.create_task(_collect(watch, seen))
        pinned = await server.pool.PinModel(pool_pb2.PinModelRequest(model=name, pinned=True))
        assert (pinned.model.pinned, pinned.model.pid) == (True, 0)
        loaded = await server.pool.LoadModel(pool_pb2.LoadModelRequest())
        assert loaded.model.state == pool_pb2.POOL_MODEL_STATE_READY
        # A watch may skip states while its reader is not ready for more.
        await eventually(lambda: seen[-1].state == pool_pb2.POOL_MODEL_STATE_READY)
        call: Any = server.complete(one, CONTEXT - 100)
        await call.read()
        problem = await failure(server.pool.EvictModel(pool_pb2.EvictModelRequest(model=name)))
        assert (problem.code, problem.reason) == (Code.FAILED_PRECONDITION, "BUSY")
        call.cancel()
        await eventually(lambda: is_idle(server, one))
        gone = await server.pool.EvictModel(pool_pb2.EvictModelRequest(model=name))
        assert gone.held_bytes > 0
        again = await server.pool.EvictModel(pool_pb2.EvictModelRequest(model=name))
        assert again.held_bytes == 0
        unpinned = await server.pool.PinModel(pool_pb2.PinModelRequest(model=name))
        assert not unpinned.model.pinned
        problem = await failure(server.pool.EvictModel(pool_pb2.EvictModelRequest(model="other")))
        assert problem.reason == "MODEL_NOT_LOADED"
        gone_state = pool_pb2.POOL_MODEL_STATE_ABSENT, False
        await eventually(lambda: (seen[-1].state, seen[-1].pinned) == gone_state)
        assert pool_pb2.POOL_MODEL_STATE_LOADING in {model.state for model in seen}
        stopping = asyncio.create_task(server.app.close())
        assert (await failure(watching)).reason == "SHUTTING_DOWN"
        await stopping


async def _collect(watch: Any, seen: list[pool_pb2.PoolModel]) -> None:
    """Read a watch of a pool with one model to its end."""
    while (message := await watch.read()) is not grpc.aio.EOF:
        seen.extend(message.pool.models)


async def test_options_of_a_load_are_those_of_the_configuration(one: Path) -> None:
    async with serving(one) as server:
        request = pb.LoadRequest(model=str(one), context_length=64, memory_override=True)
        problem = await failure(server.runner.Load(request))
        assert problem.reason == "INVALID_FIELD"
        assert problem.violations.keys() == {"context_length", "memory_override"}
        adapted = pb.LoadRequest(model=str(one), adapters=[pb.Adapter(name="a", path="/a")])
        assert (await failure(server.runner.Load(adapted))).violations.keys() == {"adapters"}
        same = pb.LoadRequest(model=str(one), context_length=CONTEXT, parallel=4)
        answer = await server.runner.Load(same)
        assert answer.model.path == str(one)
        assert answer.load_duration.ToNanoseconds() > 0


async def test_an_abort_ends_completions_of_all_models(models: tuple[Path, Path]) -> None:
    one, two = models
    async with serving(*models) as server:
        running = server.complete(one, CONTEXT - 100, request_id="a")
        await running.read()
        waiting = server.complete(two, 4, request_id="a")
        await eventually(lambda: has_state(server, two, pool_pb2.POOL_MODEL_STATE_LOADING))
        done = await server.runner.Abort(pb.AbortRequest(request_ids=["a", "b"]))
        assert done.aborted_count == 2
        for call in (running, waiting):
            problem = await broken(call)
            assert (problem.code, problem.reason) == (Code.ABORTED, "ABORTED")
        problem = await failure(server.runner.Abort(pb.AbortRequest(request_ids=[""])))
        assert problem.violations.keys() == {"request_ids[0]"}


async def test_an_abort_does_without_a_runner_that_stops(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stopping(*_args: object) -> bytes:
        raise grpc.aio.AioRpcError(
            Code.UNAVAILABLE,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(("grpc-status-details-bin", b"")),
            "the server is shutting down",
        )

    async with serving(one) as server:
        await server.pool.LoadModel(pool_pb2.LoadModelRequest(model=str(one)))
        monkeypatch.setattr(Forwarder, "call", stopping)
        done = await server.runner.Abort(pb.AbortRequest(request_ids=["a"]))
        assert done.aborted_count == 0


async def test_a_drain_waits_for_the_end_of_what_it_ends() -> None:
    completions, may_end = Completions(), asyncio.Event()
    began = asyncio.Event()

    async def complete() -> None:
        with completions.begin("a"):
            try:
                began.set()
                await asyncio.Event().wait()
            finally:
                await may_end.wait()

    running = asyncio.create_task(complete())
    await began.wait()
    drain = asyncio.create_task(completions.drain(0))
    await eventually(lambda: bool(running.cancelling()))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not drain.done()
    may_end.set()
    assert await drain == (0, 1)
    with pytest.raises(RequestAbortedError):
        await running


async def test_a_drain_refuses_new_work_and_ends_the_rest(one: Path) -> None:
    async with serving(one) as server:
        call: Any = server.complete(one, CONTEXT - 100)
        await call.read()
        drain = server.runner.Drain(pb.DrainRequest(timeout=Duration(seconds=1)))
        await eventually(lambda: _is_refused(server, one))
        answer = await drain
        assert (answer.finished_count, answer.aborted_count) == (0, 1)
        assert (await broken(call)).reason == "ABORTED"
        assert await _is_refused(server, one)
        await server.pool.LoadModel(pool_pb2.LoadModelRequest(model=str(one)))
        assert [message async for message in server.complete(one)][-1].done
        long = pb.DrainRequest(timeout=Duration(seconds=90_000))
        assert (await failure(server.runner.Drain(long))).violations.keys() == {"timeout"}


async def _is_refused(server: PoolServer, model: Path) -> bool:
    call = server.complete(model, 1)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code() is Code.UNAVAILABLE
    return False


TOKEN, USE_TOKEN = "t" * 32, "u" * 32


async def test_tokens_are_those_of_a_runner(one: Path) -> None:
    async with serving(one, token=TOKEN, use_token=USE_TOKEN) as server:
        listing = pool_pb2.ListModelsRequest()
        assert (await failure(server.pool.ListModels(listing))).reason == "UNAUTHENTICATED"
        assert (await failure(server.complete(one))).reason == "UNAUTHENTICATED"
        use = (("authorization", f"Bearer {USE_TOKEN}"),)
        messages = [message async for message in server.complete(one, metadata=use)]
        assert messages[-1].done
        assert (await server.pool.ListModels(listing, metadata=use)).models
        refused = server.pool.EvictModel(pool_pb2.EvictModelRequest(model=str(one)), metadata=use)
        assert (await failure(refused)).reason == "PERMISSION_DENIED"
        full = (("authorization", f"Bearer {TOKEN}"),)
        await server.pool.EvictModel(pool_pb2.EvictModelRequest(model=str(one)), metadata=full)


async def test_tls_is_that_of_a_runner(one: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    app = PoolApp(
        PoolServerConfig(
            listen="localhost:0", settings=settings(one), tls=TlsFiles(pair.cert, pair.key)
        )
    )
    ready = await app.start()
    try:
        trust = ("--tls-ca", str(authority.file))
        done = await asyncio.to_thread(invoke, "ps", ready.target, *trust)
        assert (done.exit_code, str(one) in done.stdout) == (0, True)
        done = await asyncio.to_thread(invoke, "ps", ready.target)
        assert (done.exit_code, done.stdout) == (1, "")
    finally:
        await app.close()


async def test_reflection_and_health_name_both_services(one: Path) -> None:
    async with serving(one) as server:
        channel: Any = server.channel
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [each async for each in stub.ServerReflectionInfo(iter([request]))]
        names = {service.name for service in answer.list_services_response.service}
        assert {"mlxrunner.v1.RunnerService", "mlxrunner.v1.PoolService"} <= names
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "mlxrunner.v1.PoolService", "plugin"):
            found = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert found.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_stop_ends_streams_and_reaps_runners(one: Path) -> None:
    async with serving(one) as server:
        call: Any = server.complete(one, CONTEXT - 100)
        await call.read()
        pid = (await server.model(one)).pid
        stopping = asyncio.create_task(server.app.close())
        problem = await broken(call)
        assert (problem.code, problem.reason) == (Code.UNAVAILABLE, "SHUTTING_DOWN")
        await stopping
        assert not psutil.pid_exists(pid)


async def test_metrics_are_by_model(
    models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = models
    caplog.set_level("INFO", "runner_client.pool.serving.app")
    async with serving(*models, metrics_listen=("127.0.0.1", 0)) as server:
        (address,) = re.findall(r"metrics on (\S+)", caplog.text)
        assert [message async for message in server.complete(one)][-1].done
        call = server.complete(one, CONTEXT - 100)
        await call.read()
        await failure(server.complete("/no/such/model"))
        # Models of the configuration are estimated in the background, and listed then.
        await eventually(lambda: _is_listed(server, two))
        text = await asyncio.to_thread(lambda: urlopen(address).read().decode())  # noqa: S310 - http
        call.cancel()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str, model: object, more: str = "") -> float:
        return float(values[f'mlx_runner_pool_{name}{{model_name="{model}"{more}}}'])

    assert (
        values["mlx_runner_pool_spare_processes"] == values["mlx_runner_pool_spare_bytes"] == "0.0"
    )
    assert value("state", one, ',state="ready"') == 1
    assert value("state", two, ',state="absent"') == 1
    assert value("held_bytes", one) > 0
    assert value("leases", one) == 1
    assert value("loads_total", one) == 1
    assert value("requests_total", one, ',outcome="granted"') == 2
    assert value("requests_total", "", ',outcome="refused"') == 1
    assert value("wait_seconds_count", one) == 2


async def _is_listed(server: PoolServer, model: Path) -> bool:
    return str(model) in await server.models()
