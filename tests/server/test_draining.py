"""Drain: new completions are refused, and the present ones finish or end by the timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.validation import drain_seconds
from support.harness import CompletionCall, Server, eventually, failure, running, tokens

UNLOAD = pb.UnloadRequest()

DrainCall = grpc.aio.UnaryUnaryCall[pb.DrainRequest, pb.DrainResponse]


def drain(server: Server, seconds: float | None = None, **options: Any) -> DrainCall:
    request = pb.DrainRequest()
    if seconds is not None:
        request.timeout.FromNanoseconds(round(seconds * 1e9))
    return server.stub.Drain(request, **options)


def counts(answer: pb.DrainResponse) -> tuple[int, int]:
    return answer.finished_count, answer.aborted_count


async def reach_state(server: Server, state: pb.State.ValueType) -> None:
    async def reached() -> bool:
        return (await server.status()).state == state

    await eventually(reached)


async def start_stuck(server: Server, count: int = 1, **options: Any) -> list[CompletionCall]:
    """Start completions that wait for the gate of the model library."""
    server.backend.step_gate.shut()
    calls = [server.start(f"prompt {i}", **options) for i in range(count)]
    await eventually(lambda: server.view.request_count == count)
    await server.thread(server.backend.step_gate.wait_arrival)
    return calls


async def assert_refused(server: Server) -> None:
    problem = await failure(server.start())
    assert (problem.code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert "draining" in problem.message


async def test_present_completions_finish_and_new_ones_are_refused(server: Server) -> None:
    await server.load(parallel=2)
    calls = await start_stuck(server, 3, num_predict=20)
    call = drain(server)
    await reach_state(server, pb.STATE_DRAINING)
    await assert_refused(server)
    assert not call.done()
    assert await server.health() == health_pb2.HealthCheckResponse.SERVING
    server.backend.step_gate.open()
    for each in calls:
        assert [message async for message in each][-1].eval_count == 20
    assert counts(await call) == (3, 0)
    # Nothing runs, and the runner stays closed to new work.
    status = await server.status()
    assert (status.state, status.running_count) == (pb.STATE_DRAINING, 0)
    assert (status.progress, status.model.name) == (100, "fake")
    await assert_refused(server)
    await server.assert_nothing_left()


async def test_the_timeout_ends_the_rest(server: Server) -> None:
    await server.load(parallel=2)
    calls = [server.start(str(i), num_predict=4000) for i in range(3)]
    await eventually(lambda: server.view.request_count == 3)
    server.backend.step_gate.shut()
    call = drain(server, 0.01)
    for each in calls:
        problem = await failure(each)
        assert (problem.code, problem.reason) == (grpc.StatusCode.ABORTED, "ABORTED")
        assert "a Drain whose timeout passed" in problem.message
    # The step is not over yet, so their rows still hold memory.
    assert not call.done()
    server.backend.step_gate.open()
    assert counts(await call) == (0, 3)
    await server.assert_nothing_left()


async def test_a_timeout_of_zero_ends_everything_at_once(loaded: Server) -> None:
    call = loaded.start(num_predict=4000)
    await anext(aiter(call))
    assert counts(await drain(loaded, 0)) == (0, 1)
    assert (await failure(call)).reason == "ABORTED"


async def test_a_finished_drain_before_its_timeout_aborts_nothing(loaded: Server) -> None:
    (call,) = await start_stuck(loaded, num_predict=2)
    drained = drain(loaded, 3600)
    await reach_state(loaded, pb.STATE_DRAINING)
    loaded.backend.step_gate.open()
    assert counts(await drained) == (1, 0)
    assert [message async for message in call][-1].done


async def test_every_end_is_counted(loaded: Server) -> None:
    """Count a cancelled completion as finished, and an aborted one as aborted."""
    loaded.backend.step_gate.shut()
    calls = [loaded.start(request_id=str(i), num_predict=4) for i in range(3)]
    await eventually(lambda: loaded.view.request_count == 3)
    drained = drain(loaded)
    await reach_state(loaded, pb.STATE_DRAINING)
    calls[0].cancel()
    await loaded.stub.Abort(pb.AbortRequest(request_ids=["1"]))
    loaded.backend.step_gate.open()
    assert counts(await drained) == (2, 1)


async def test_an_idle_runner_is_drained_at_once(loaded: Server) -> None:
    assert counts(await drain(loaded)) == (0, 0)
    await assert_refused(loaded)
    assert counts(await drain(loaded)) == (0, 0)


async def test_other_calls_are_answered(loaded: Server) -> None:
    await drain(loaded)
    assert (await loaded.stub.Tokenize(pb.TokenizeRequest(content="ab"))).token_ids
    assert (await loaded.stub.Detokenize(pb.DetokenizeRequest(token_ids=[97]))).content == "a"
    await loaded.stub.Trim(pb.TrimRequest())
    assert not (await loaded.stub.Abort(pb.AbortRequest(request_ids=["x"]))).aborted_count


async def test_a_load_ends_the_draining(loaded: Server) -> None:
    await drain(loaded)
    await loaded.load("other")
    assert (await loaded.status()).state == pb.STATE_ACTIVE
    assert len(tokens(await loaded.complete(num_predict=2))) == 2


async def test_an_unload_ends_the_draining_and_the_wait(loaded: Server) -> None:
    (call,) = await start_stuck(loaded, num_predict=4000)
    drained = drain(loaded)
    await reach_state(loaded, pb.STATE_DRAINING)
    unload = asyncio.ensure_future(loaded.stub.Unload(UNLOAD))
    await eventually(lambda: loaded.view.model_command is not None)
    loaded.backend.step_gate.open()
    await unload
    assert (await failure(call)).reason == "SHUTTING_DOWN"
    assert counts(await drained) == (1, 0)
    assert (await loaded.status()).state == pb.STATE_IDLE
    await loaded.load()
    assert await loaded.text(num_predict=2)


async def test_a_refused_load_does_not_end_the_draining(loaded: Server) -> None:
    await drain(loaded)
    loaded.backend.check_error = ValueError("no model")
    await failure(loaded.load("other"))
    assert (await loaded.status()).state == pb.STATE_DRAINING
    await assert_refused(loaded)


async def test_without_a_model_nothing_changes(server: Server) -> None:
    assert counts(await drain(server)) == (0, 0)
    assert (await server.status()).state == pb.STATE_IDLE
    await server.load()
    assert (await server.status()).state == pb.STATE_ACTIVE


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_cancelled_drain_accepts_work_again(loaded: Server, how: str) -> None:
    (call,) = await start_stuck(loaded, num_predict=4)
    drained = drain(loaded, timeout=1.0 if how == "deadline" else None)
    await reach_state(loaded, pb.STATE_DRAINING)
    if how == "cancel":
        drained.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await drained
    await reach_state(loaded, pb.STATE_ACTIVE)
    loaded.backend.step_gate.open()
    assert [message async for message in call][-1].eval_count == 4
    assert await loaded.text(num_predict=2)


async def test_two_drains_return_and_one_of_them_suffices(loaded: Server) -> None:
    (call,) = await start_stuck(loaded, num_predict=4)
    first, second, third = (drain(loaded) for _ in range(3))
    await eventually(lambda: len(loaded.app.engine._registry._drains) == 3)
    first.cancel()
    await eventually(lambda: len(loaded.app.engine._registry._drains) == 2)
    await assert_refused(loaded)
    loaded.backend.step_gate.open()
    assert counts(await second) == counts(await third) == (1, 0)
    assert [message async for message in call][-1].done
    await assert_refused(loaded)


async def test_a_completion_being_tokenized_is_refused_too(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion that was checked before the drain began, and is queued after it."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def encode(*_args: object) -> list[int]:
        reached.set()
        await go.wait()
        return [1]

    monkeypatch.setattr("runner_server.api.generation.encode_prompt", encode)
    call = asyncio.ensure_future(failure(loaded.start()))
    await reached.wait()
    assert counts(await drain(loaded)) == (0, 0)
    go.set()
    assert (await call).reason == "SHUTTING_DOWN"


async def test_a_drain_ends_when_the_runner_stops(loaded: Server) -> None:
    await start_stuck(loaded)
    drained = drain(loaded)
    await reach_state(loaded, pb.STATE_DRAINING)
    loaded.app.engine.stop()
    # The step has not returned: the drain does not wait for it.
    assert (await failure(drained)).reason == "SHUTTING_DOWN"
    assert (await loaded.status()).state == pb.STATE_STOPPING


async def test_a_drain_ends_when_the_engine_is_lost(loaded: Server) -> None:
    await start_stuck(loaded)
    drained = drain(loaded)
    await reach_state(loaded, pb.STATE_DRAINING)
    loaded.app.engine.lose("it hangs")
    assert (await failure(drained)).reason == "SHUTTING_DOWN"


@pytest.mark.parametrize(
    "limit",
    [
        Duration(seconds=-1),
        Duration(nanos=-1),
        Duration(seconds=86_400, nanos=1),
        Duration(seconds=2**63 - 1),
        Duration(seconds=1, nanos=-1),
        Duration(seconds=1, nanos=1_000_000_000),
        Duration(nanos=-(2**31)),
    ],
    ids=str,
)
async def test_a_timeout_out_of_range_is_refused(loaded: Server, limit: Duration) -> None:
    problem = await failure(loaded.stub.Drain(pb.DrainRequest(timeout=limit)))
    assert (problem.reason, set(problem.violations)) == ("INVALID_FIELD", {"timeout"})
    assert await loaded.text(num_predict=1)


def test_a_timeout_in_range_is_accepted() -> None:
    assert drain_seconds(pb.DrainRequest()) is None
    for seconds, nanos in ((0, 0), (86_400, 0), (3, 500_000_000)):
        request = pb.DrainRequest(timeout=Duration(seconds=seconds, nanos=nanos))
        assert drain_seconds(request) == seconds + nanos / 1e9


@pytest.mark.mlx
async def test_a_runner_with_mlx_is_drained(
    socket_dir: Path, model_dir: Callable[..., Path]
) -> None:
    from runner_server.mlx_backend import MlxBackend

    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(model_dir()), parallel=2)
        options: dict[str, Any] = {"num_predict": 60, "logit_bias": {0: -100.0}}
        calls = [server.start(str(i), **options) for i in range(4)]
        await eventually(lambda: server.view.request_count == 4)
        assert counts(await drain(server)) == (4, 0)
        for call in calls:
            assert [message async for message in call][-1].eval_count == 60
        await assert_refused(server)
        await server.load(str(model_dir()))
        assert await server.text(num_predict=3)
