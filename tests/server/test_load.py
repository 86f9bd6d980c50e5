"""Load and Unload, and the Status meanwhile."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.types import State
from runner_server.errors import ModelNotFound
from support.fakes import CONTEXT_LENGTH, EOS, VOCAB_SIZE, WEIGHT_BYTES
from support.harness import Server, StartServer, eventually, failure, tokens

UNLOAD = pb.UnloadRequest()


async def test_load_answers_with_the_model_and_status_has_it(server: Server) -> None:
    answer = await server.load("some-model", context_length=100, parallel=3)
    model = answer.model
    assert (model.name, model.architecture, model.dtype) == ("some-model", "fake", "float32")
    assert (model.context_length, model.vocab_size) == (CONTEXT_LENGTH, VOCAB_SIZE)
    assert (model.weight_bytes, list(model.eos_token_ids)) == (WEIGHT_BYTES, [EOS])
    assert answer.load_duration.ToNanoseconds() > 0
    status = await server.status()
    assert status.model == model
    assert (status.state, status.progress) == (pb.STATE_ACTIVE, 100)
    assert (status.context_length, status.parallel) == (100, 3)
    assert status.memory_usage.limit_bytes == 1 << 30


async def test_status_of_a_server_without_a_model(server: Server) -> None:
    await eventually(lambda: bool(server.app.engine.device))
    status = await server.status()
    assert (status.state, status.progress, status.step_count) == (pb.STATE_IDLE, 0, 0)
    assert (status.context_length, status.parallel, status.memory) == (0, 0, 0)
    assert not status.HasField("model")
    assert not status.HasField("last_progress_age")
    assert status.memory_usage.limit_bytes == 0
    assert status.memory_usage.process_bytes > 2**20
    assert status.device == "cpu: fake"
    assert status.pid > 0
    assert status.server_version
    assert len(status.runner_id) >= 16


async def test_a_process_keeps_its_runner_id(server: Server) -> None:
    first, second = await server.status(), await server.status()
    assert first.runner_id == second.runner_id
    assert first.uptime_duration.ToNanoseconds() <= second.uptime_duration.ToNanoseconds()


async def test_progress_shows_while_loading(server: Server) -> None:
    gate = server.backend.load_gate
    gate.shut()
    load = asyncio.ensure_future(server.load())
    seen = []
    for _ in range(6):
        await server.thread(gate.wait_arrival)
        status = await server.status()
        assert status.state == pb.STATE_LOADING
        assert status.HasField("last_progress_age")
        seen.append(status.progress)
        gate.allow()
        await server.thread(lambda: gate.wait_passed(len(seen)))
    await load
    assert seen == [0, 0, 20, 40, 60, 80]
    assert (await server.status()).progress == 100


async def test_the_state_is_loading_as_soon_as_a_load_is_requested(server: Server) -> None:
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load())
    await server.thread(server.backend.load_gate.wait_arrival)
    assert (await server.status()).state == pb.STATE_LOADING
    problem = await failure(server.start())
    assert problem.reason == "MODEL_NOT_LOADED"
    server.backend.load_gate.open()
    await load


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_cancelled_load_stops_and_a_new_one_works(server: Server, how: str) -> None:
    gate = server.backend.load_gate
    gate.shut()
    # The deadline must leave time for the load to begin, on a busy machine too.
    timeout = 1.0 if how == "deadline" else None
    load = server.stub.Load(pb.LoadRequest(model="fake"), timeout=timeout)
    gate.allow(2)
    await server.thread(lambda: gate.wait_passed(2))
    await server.thread(gate.wait_arrival)
    if how == "cancel":
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
    else:
        with pytest.raises(grpc.aio.AioRpcError):
            await load
    await eventually(lambda: _is_cancelled(server))
    gate.open()
    await _wait_until_idle(server)
    # The load stopped at its next report, and passed the gate for that one only.
    assert gate._passed == 3
    status = await server.status()
    assert (status.state, status.progress, status.memory) == (pb.STATE_IDLE, 0, 0)
    await server.load()
    assert await server.text(num_predict=3)


async def test_a_load_cancelled_before_it_begins_does_nothing(loaded: Server) -> None:
    """Cancel a load while the engine is in a step and has not begun to load."""
    loaded.backend.step_gate.shut()
    call = loaded.start("x", num_predict=2)
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    load = loaded.stub.Load(pb.LoadRequest(model="other"))
    await eventually(lambda: loaded.view.command_count == 1)
    load.cancel()
    await eventually(lambda: _is_cancelled(loaded))
    loaded.backend.step_gate.open()
    assert [message async for message in call][-1].eval_count == 2
    status = await loaded.status()
    assert (status.state, status.model.name) == (pb.STATE_ACTIVE, "fake")
    assert status.progress == 100


async def test_busy_while_a_load_runs(server: Server) -> None:
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load())
    await server.thread(server.backend.load_gate.wait_arrival)
    for call in (server.load("other"), server.stub.Unload(UNLOAD)):
        problem = await failure(call)
        assert (problem.code, problem.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BUSY")
    server.backend.load_gate.open()
    assert (await load).model.name == "fake"


async def test_unload_gives_the_memory_back(loaded: Server) -> None:
    assert (await loaded.status()).memory == WEIGHT_BYTES
    assert (await loaded.stub.Unload(UNLOAD)).freed_bytes == WEIGHT_BYTES
    status = await loaded.status()
    assert (status.state, status.progress, status.memory) == (pb.STATE_IDLE, 0, 0)
    assert not status.HasField("model")
    assert (await failure(loaded.start())).reason == "MODEL_NOT_LOADED"
    assert (await loaded.stub.Unload(UNLOAD)).freed_bytes == 0


async def test_unload_ends_running_and_queued_streams(server: Server) -> None:
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    calls = [server.start("x" * (i + 1)) for i in range(3)]
    await eventually(lambda: server.view.request_count == 3)
    # Otherwise the engine may carry the unload out before it begins a step.
    await server.thread(server.backend.step_gate.wait_arrival)
    unload = asyncio.ensure_future(server.stub.Unload(UNLOAD))
    await eventually(lambda: server.view.model_command is not None)
    server.backend.step_gate.open()
    for call in calls:
        problem = await failure(call)
        assert (problem.code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert (await unload).freed_bytes >= WEIGHT_BYTES
    await server.assert_nothing_left()


async def test_a_load_replaces_the_model_and_ends_its_streams(loaded: Server) -> None:
    gate = loaded.backend.step_gate
    gate.shut()
    call = loaded.start(num_predict=4000)
    await loaded.thread(gate.wait_arrival)
    load = asyncio.ensure_future(loaded.load("other"))
    # The load is requested, and waits for the step.
    await eventually(lambda: loaded.app.engine.state().state is State.LOADING)
    gate.open()
    await load
    assert (await failure(_read_on(call))).reason == "SHUTTING_DOWN"
    assert (await loaded.status()).model.name == "other"
    assert len(tokens(await loaded.complete(num_predict=3))) == 3
    assert all(executor.closed for executor in loaded.backend.executors[:-1])


async def test_a_failed_load_leaves_no_model_and_status_says_why(loaded: Server) -> None:
    loaded.backend.load_error = ValueError("secret of the host")
    problem = await failure(loaded.load("broken"))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INTERNAL, "GENERATION_FAILED")
    assert "secret" not in problem.message
    status = await loaded.status()
    assert (status.state, status.memory, status.progress) == (pb.STATE_IDLE, 0, 0)
    assert "broken" in status.last_error
    await loaded.load()
    assert await loaded.text(num_predict=2)


async def test_a_missing_model_leaves_the_loaded_one_running(loaded: Server) -> None:
    call = loaded.start(num_predict=4000)
    await call.read()
    loaded.backend.check_error = ModelNotFound("no such model")
    problem = await failure(loaded.load("missing"))
    assert problem.reason == "MODEL_NOT_FOUND"
    status = await loaded.status()
    assert (status.state, status.model.name) == (pb.STATE_ACTIVE, "fake")
    assert "missing" in status.last_error
    assert await call.read()
    call.cancel()
    assert await loaded.text(num_predict=2)


async def test_every_call_of_the_library_is_on_the_engine_thread(start_server: StartServer) -> None:
    server = await start_server()
    await server.load()
    await server.complete(num_predict=2)
    await server.stub.Unload(UNLOAD)
    await server.app.close()
    names = [name for name, _ in server.backend.calls]
    assert names[0] == "open"
    assert names[-2:] == ["release", "close"]
    assert {thread for _, thread in server.backend.calls} == {"engine"}


async def _read_on(call: object) -> None:
    async for _ in call:  # type: ignore[attr-defined]  # a call
        pass


async def _wait_until_idle(server: Server) -> None:
    async def reached() -> bool:
        return (await server.status()).state == pb.STATE_IDLE

    await eventually(reached)


def _is_cancelled(server: Server) -> bool:
    command = server.view.model_command
    return command is None or command.cancelled.is_set()


async def test_a_call_during_a_load_is_told_to_wait(server: Server) -> None:
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load())
    server.backend.load_gate.allow(2)
    await server.thread(server.backend.load_gate.wait_arrival)
    problem = await failure(server.start())
    assert problem.reason == "MODEL_NOT_LOADED"
    assert problem.message == (
        "the model is being loaded (20 %); wait until Status says STATE_ACTIVE"
    )
    server.backend.load_gate.open()
    await load
    assert await server.text(num_predict=1)
