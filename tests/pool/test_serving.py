"""The server of a pool: ``RunnerService`` for many models, with real runners."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration

from mlxrunner.v1 import pool_pb2, runner_pb2_grpc
from mlxrunner.v1 import runner_pb2 as pb
from runner_client import Options, errors
from runner_client.rpc.transport import channel as transport_channel
from support.harness import eventually, failure
from support.pool_server import (
    CONTEXT,
    Direct,
    PoolServer,
    broken,
    completion,
    has_state,
    is_idle,
    need_bytes,
    running_count,
    serving,
    settings,
)

pytestmark = [pytest.mark.mlx, pytest.mark.slow]

Code = grpc.StatusCode


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


async def test_a_conversation_gets_the_runners_answer(one: Path) -> None:
    async with serving(one) as server:
        message = pb.ChatMessage(role=pb.ROLE_USER, content="The fox")
        options = pb.CompletionOptions(seed=1, num_predict=8)
        request = pb.ChatRequest(messages=[message], options=options, model=str(one))
        answer = [part async for part in server.runner.Chat(request)]
        rendered = await server.runner.RenderChat(
            pb.RenderChatRequest(messages=[message], model=str(one))
        )
        assert rendered.prompt == "The fox."
        assert answer[-1].prompt_eval_count == len(rendered.token_ids)
        request.ClearField("model")
        expected = [part async for part in Direct(server, one)("Chat", request)]
        assert answer[-1].eval_count == expected[-1].eval_count > 0
        assert "".join(p.content for p in answer) == "".join(p.content for p in expected)


async def test_texts_get_the_runners_vectors(one: Path) -> None:
    async with serving(one) as server:
        request = pb.EmbedRequest(inputs=[pb.EmbedInput(text="The fox")], model=str(one))
        answer = await server.runner.Embed(request)
        assert len(answer.embeddings[0].values) == 64
        request.ClearField("model")
        direct = await Direct(server, one)("Embed", request)
        assert direct.embeddings == answer.embeddings
        problem = await failure(server.runner.Embed(pb.EmbedRequest(model=str(one))))
        assert problem.violations


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
    "no conversation": lambda model: pb.RenderChatRequest(model=model),
    "no conversation to answer": lambda model: pb.ChatRequest(model=model),
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
        await eventually(lambda: is_idle(server, one))


async def test_a_deadline_reaches_the_runner(one: Path) -> None:
    async with serving(one) as server:
        await server.pool.LoadModel(pool_pb2.LoadModelRequest(model=str(one)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in server.complete(one, CONTEXT - 100, timeout=0.5):
                pass
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        await eventually(lambda: is_idle(server, one))


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
        await eventually(lambda: has_state(server, one, pool_pb2.POOL_MODEL_STATE_LOADING))
        call.cancel()
        await eventually(lambda: has_state(server, one, pool_pb2.POOL_MODEL_STATE_ABSENT))


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


async def test_a_slow_reader_is_bounded(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner preempts the request once the connections are full, as it does directly."""
    # Small windows, which fill sooner: those of the pool hold 11,000 tokens otherwise.
    options = (*transport_channel._OPTIONS, ("grpc.http2.bdp_probe", 0))
    monkeypatch.setattr(transport_channel, "_OPTIONS", options)
    async with serving(one) as server:
        await server.pool.LoadModel(pool_pb2.LoadModelRequest(model=str(one)))
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
        await eventually(lambda: is_idle(server, one))


async def _is_stalled(server: PoolServer, model: Path) -> bool:
    """Return whether a request runs, but the engine makes no steps for a moment."""
    request = pb.StatusRequest(model=str(model))
    before = await server.runner.Status(request)
    await asyncio.sleep(0.3)
    after = await server.runner.Status(request)
    return after.running_count == 1 and before.step_count == after.step_count
