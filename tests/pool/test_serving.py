"""The server of a pool: ``RunnerService`` for many models, with real runners."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mlxrunner.v1 import pool_pb2, runner_pb2_grpc
from mlxrunner.v1 import runner_pb2 as pb
from runner_client import LoadOptions, Options, errors
from runner_client.estimate import estimate
from runner_client.pool.serving.app import PoolApp
from runner_client.pool.serving.config import PoolServerConfig
from runner_common.serving.tls import TlsFiles
from support.certificates import Authority
from support.command_line import invoke
from support.harness import Problem, eventually, failure
from support.models import build_model
from support.pool_server import CONTEXT, PoolServer, completion, serving, settings

pytestmark = [pytest.mark.mlx, pytest.mark.slow]

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return (
        build_model(folder / "one", seed=1, max_position_embeddings=CONTEXT),
        build_model(folder / "two", seed=2, max_position_embeddings=CONTEXT),
    )


@pytest.fixture(scope="module")
def one(models: tuple[Path, Path]) -> Path:
    return models[0]


def need_bytes(model: Path) -> int:
    options = LoadOptions(context_length=CONTEXT, parallel=4, prefix_cache_bytes=0)
    return estimate(str(model), options=options).total_bytes


class Direct:
    """Calls to the runner of a loaded model, around the pool."""

    def __init__(self, server: PoolServer, model: Path) -> None:
        process = server.app.pool.member(str(model)).process
        assert process.address
        channel = grpc.aio.insecure_channel(process.address)
        self._stub = runner_pb2_grpc.RunnerServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {process.token}"),)

    def __call__(self, rpc: str, request: object) -> Any:
        """Start a call."""
        return getattr(self._stub, rpc)(request, metadata=self._metadata)


async def broken(call: Any) -> Problem:
    """Read a stream that has been read before, which must fail, and return the error."""
    return await failure(_rest(call))


async def _rest(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def running_count(server: PoolServer, model: Path) -> int:
    return (await server.runner.Status(pb.StatusRequest(model=str(model)))).running_count


async def test_a_request_loads_its_model_and_gets_the_runners_answer(one: Path) -> None:
    async with serving(one) as server:
        assert (await server.model(one)).state == pool_pb2.POOL_MODEL_STATE_ABSENT
        messages = [message async for message in server.complete(one, 8)]
        assert messages[-1].done
        assert messages[-1].eval_count == 8
        same = Direct(server, one)("Completion", completion("", 8))
        expected = [message async for message in same]
        assert _text(messages) == _text(expected)
        model = await server.model(one)
        assert model.state == pool_pb2.POOL_MODEL_STATE_READY
        assert (model.path, model.progress, model.lease_count) == (str(one), 100, 0)
        assert model.HasField("idle_duration")
        assert model.memory.weight_bytes > 0
        assert model.held_bytes > model.memory.weight_bytes
        assert psutil.pid_exists(model.pid)
        # The only configured model is meant by an empty name.
        assert [message async for message in server.complete("", 2)][-1].done


def _text(messages: list[pb.CompletionResponse]) -> str:
    return "".join(message.content for message in messages)


async def test_the_library_works_against_a_pool(models: tuple[Path, Path]) -> None:
    one, two = map(str, models)
    async with serving(*models) as server, server.client() as client:
        options = Options(num_predict=4, temperature=0, logit_bias={0: -100})
        first = await client.complete("def", options=options, model=one)
        second = await client.complete("def", options=options, model=two)
        assert first.content != second.content
        ids = await client.tokenize("def main", model=one)
        assert await client.detokenize(ids, model=one) == "def main"
        assert (await client.status(model=one)).model is not None
        async with client.watch_status(model=two) as statuses:
            async for status in statuses:
                assert status.model
                assert status.model.path == two
                break
        assert await client.trim(model=one) >= 0
        assert (await client.load(one)).model.path == one
        assert (await client.estimate(one)).fits
        with pytest.raises(errors.InvalidRequestError, match="model: required"):
            await client.complete("def")
        await client.unload(model=one)
        with pytest.raises(errors.ModelNotLoadedError) as caught:
            await client.status(model=one)
        assert caught.value.model == one
        assert await client.is_serving("mlxrunner.v1.PoolService")


WRONG: dict[str, Callable[[str], Any]] = {
    "a field out of range": lambda model: completion(model, 1, logprobs=99),
    "two fields out of range": lambda model: completion(
        model, options=pb.CompletionOptions(temperature=-1, top_k=-1)
    ),
    "a prompt that is too long": lambda model: completion(
        model, prompt_token_ids=pb.TokenIds(ids=[1] * (CONTEXT + 1))
    ),
    "an unknown token": lambda model: pb.DetokenizeRequest(token_ids=[-1], model=model),
    "a size out of range": lambda model: pb.TrimRequest(prefix_cache_bytes=-1, model=model),
    "an interval out of range": lambda model: pb.WatchStatusRequest(
        interval=Duration(seconds=-1), model=model
    ),
}


async def test_errors_are_those_of_the_runner(one: Path) -> None:
    async with serving(one) as server:
        await server.pool.LoadModel(pool_pb2.LoadModelRequest(model=str(one)))
        direct = Direct(server, one)
        for name, make in WRONG.items():
            rpc = type(make("")).__name__.removesuffix("Request")
            through = await failure(getattr(server.runner, rpc)(make(str(one))))
            expected = await failure(direct(rpc, make("")))
            assert through == expected, name


async def test_an_unknown_field_is_refused(one: Path) -> None:
    async with serving(one) as server:
        unknown = b"\xba\x06\x01x"
        for rpc, request in (
            ("mlxrunner.v1.RunnerService/Completion", completion(one)),
            ("mlxrunner.v1.RunnerService/Tokenize", pb.TokenizeRequest(model=str(one))),
            ("mlxrunner.v1.PoolService/ListModels", pool_pb2.ListModelsRequest()),
        ):
            call: Any = server.channel.unary_unary(f"/{rpc}")
            problem = await failure(call(request.SerializeToString() + unknown))
            assert (problem.code, problem.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
            assert "field 103" in problem.message
        # Nothing was loaded for it.
        assert (await server.model(one)).state == pool_pb2.POOL_MODEL_STATE_ABSENT


async def test_errors_of_the_lease_are_those_of_the_table(one: Path, tmp_path: Path) -> None:
    small = settings(one, budget_bytes=1_000_000)
    async with serving(pool_settings=small) as server:
        problem = await failure(server.complete(tmp_path / "absent"))
        assert (problem.code, problem.reason) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
        assert problem.metadata == {"model": str(tmp_path / "absent")}
        (tmp_path / "config.json").write_text("{}")
        problem = await failure(server.complete(tmp_path))
        assert problem.reason == "MODEL_UNSUPPORTED"
        problem = await failure(server.complete(one))
        assert (problem.code, problem.reason) == (Code.RESOURCE_EXHAUSTED, "INSUFFICIENT_MEMORY")
        assert problem.metadata["availableBytes"] == "1000000"
        assert int(problem.metadata["requiredBytes"]) > 1_000_000
        problem = await failure(server.complete("x" * 5000))
        assert problem.violations.keys() == {"model"}
        for call in (
            server.runner.Status(pb.StatusRequest(model=str(one))),
            server.runner.Trim(pb.TrimRequest(model=str(one))),
            server.runner.WatchStatus(pb.WatchStatusRequest(model=str(one))),
        ):
            problem = await failure(call)
            assert (problem.reason, problem.metadata) == ("MODEL_NOT_LOADED", {"model": str(one)})


async def test_a_cancelled_stream_frees_the_row_and_the_lease(one: Path) -> None:
    async with serving(one) as server:
        call: Any = server.complete(one, CONTEXT - 100)
        assert (await call.read()).token_ids
        assert await running_count(server, one) == 1
        assert (await server.model(one)).lease_count == 1
        call.cancel()
        await eventually(lambda: _is_idle(server, one))


async def _is_idle(server: PoolServer, model: Path) -> bool:
    leases = (await server.model(model)).lease_count
    return not leases and not await running_count(server, model)


async def test_a_deadline_reaches_the_runner(one: Path) -> None:
    async with serving(one) as server:
        await server.pool.LoadModel(pool_pb2.LoadModelRequest(model=str(one)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in server.complete(one, CONTEXT - 100, timeout=0.5):
                pass
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        await eventually(lambda: _is_idle(server, one))


async def test_a_deadline_ends_the_wait_for_memory(models: tuple[Path, Path]) -> None:
    one, two = models
    budget = int(1.5 * max(map(need_bytes, models)))
    async with serving(pool_settings=settings(*models, budget_bytes=budget)) as server:
        call = server.complete(one, CONTEXT - 100)
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.complete(two, timeout=0.5).read()
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        await eventually(lambda: _is_not_wanted(server, two))
        waiting = server.complete(two)
        await eventually(lambda: _waits_for_memory(server, two))
        waiting.cancel()
        await eventually(lambda: _is_not_wanted(server, two))
        call.cancel()


async def _is_not_wanted(server: PoolServer, model: Path) -> bool:
    return (await server.model(model)).waiting_count == 0


async def _waits_for_memory(server: PoolServer, model: Path) -> bool:
    found = await server.model(model)
    return found.position == 1 and "waiting for" in found.reason


async def test_headers_tell_that_the_runner_has_the_request(one: Path) -> None:
    async with serving(one) as server:
        calls = [server.complete(one, CONTEXT - 100) for _ in range(4)]
        for call in calls:
            await call.read()
        queued = server.complete(one)
        await queued.initial_metadata()
        status = await server.runner.Status(pb.StatusRequest(model=str(one)))
        assert (status.running_count, status.queued_count) == (4, 1)
        for call in calls:
            call.cancel()
        assert [message async for message in queued][-1].done


async def test_cancelling_the_only_request_for_a_load_cancels_the_load(one: Path) -> None:
    async with serving(one) as server:
        call: Any = server.complete(one)
        await eventually(lambda: _has_state(server, one, pool_pb2.POOL_MODEL_STATE_LOADING))
        call.cancel()
        await eventually(lambda: _has_state(server, one, pool_pb2.POOL_MODEL_STATE_ABSENT))


async def _has_state(server: PoolServer, model: Path, state: int) -> bool:
    return (await server.model(model)).state == state


async def test_two_models_take_turns_within_the_budget(models: tuple[Path, Path]) -> None:
    budget = int(1.5 * max(map(need_bytes, models)))
    async with serving(pool_settings=settings(*models, budget_bytes=budget)) as server:
        texts: dict[Path, set[str]] = {model: set() for model in models}
        for _ in range(2):
            for model in models:
                messages = [message async for message in server.complete(model)]
                texts[model].add(_text(messages))
                listed = await server.pool.ListModels(pool_pb2.ListModelsRequest())
                assert 0 < listed.held_bytes <= listed.budget_bytes == budget
                states = {each.name: each.state for each in listed.models}
                assert states[str(model)] == pool_pb2.POOL_MODEL_STATE_READY
                assert sum(each.pid != 0 for each in listed.models) == 1
        assert [len(found) for found in texts.values()] == [1, 1]
        refused = pool_pb2.LoadModelRequest(model=str(models[0]), no_eviction=True)
        problem = await failure(server.pool.LoadModel(refused))
        assert problem.reason == "INSUFFICIENT_MEMORY"


async def test_a_killed_runner_ends_its_stream_and_is_replaced(one: Path) -> None:
    async with serving(one) as server:
        call: Any = server.complete(one, CONTEXT - 100)
        await call.read()
        pid = (await server.model(one)).pid
        os.kill(pid, signal.SIGKILL)
        problem = await broken(call)
        assert (problem.code, problem.reason) == (Code.UNAVAILABLE, "SHUTTING_DOWN")
        assert "SIGKILL" in problem.message
        assert [message async for message in server.complete(one)][-1].done
        assert (await server.model(one)).pid != pid


async def test_a_slow_reader_is_bounded(one: Path) -> None:
    """The runner preempts the request once the connections are full, as it does directly."""
    async with serving(one) as server:
        await server.pool.LoadModel(pool_pb2.LoadModelRequest(model=str(one)))
        # A small window, which fills sooner.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.enable_http_proxy", 0)]
        channel = grpc.aio.insecure_channel(server.address, options=options)
        stub = runner_pb2_grpc.RunnerServiceStub(channel)
        call: Any = stub.Completion(completion(one, CONTEXT - 100, logprobs=20))
        await call.read()
        before = psutil.Process().memory_info().rss
        await eventually(lambda: _is_stalled(server, one), 120)
        assert psutil.Process().memory_info().rss - before < 32 * 2**20
        assert [message async for message in server.complete(one)][-1].done
        # The stream goes on where it stopped.
        assert (await call.read()).token_ids
        await channel.close()
        await eventually(lambda: _is_idle(server, one))


async def _is_stalled(server: PoolServer, model: Path) -> bool:
    """Return whether a request runs, but the engine makes no steps for a moment."""
    request = pb.StatusRequest(model=str(model))
    before = await server.runner.Status(request)
    await asyncio.sleep(0.3)
    after = await server.runner.Status(request)
    return after.running_count == 1 and before.step_count == after.step_count


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
        call: Any = server.complete(one, CONTEXT - 100)
        await call.read()
        problem = await failure(server.pool.EvictModel(pool_pb2.EvictModelRequest(model=name)))
        assert (problem.code, problem.reason) == (Code.FAILED_PRECONDITION, "BUSY")
        call.cancel()
        await eventually(lambda: _is_idle(server, one))
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
        states = {model.state for model in seen}
        assert {pool_pb2.POOL_MODEL_STATE_LOADING, pool_pb2.POOL_MODEL_STATE_READY} <= states
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
        await eventually(lambda: _has_state(server, two, pool_pb2.POOL_MODEL_STATE_LOADING))
        done = await server.runner.Abort(pb.AbortRequest(request_ids=["a", "b"]))
        assert done.aborted_count == 2
        for call in (running, waiting):
            problem = await broken(call)
            assert (problem.code, problem.reason) == (Code.ABORTED, "ABORTED")
        problem = await failure(server.runner.Abort(pb.AbortRequest(request_ids=[""])))
        assert problem.violations.keys() == {"request_ids[0]"}


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
        text = await asyncio.to_thread(lambda: urlopen(address).read().decode())  # noqa: S310 - http
        call.cancel()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str, model: object, more: str = "") -> float:
        return float(values[f'mlx_runner_pool_{name}{{model_name="{model}"{more}}}'])

    assert value("state", one, ',state="ready"') == 1
    assert value("state", two, ',state="absent"') == 1
    assert value("held_bytes", one) > 0
    assert value("leases", one) == 1
    assert value("loads_total", one) == 1
    assert value("requests_total", one, ',outcome="granted"') == 2
    assert value("requests_total", "", ',outcome="refused"') == 1
    assert value("wait_seconds_count", one) == 2
