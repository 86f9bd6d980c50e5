"""Requests that name the model they mean."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.message import Message

from mlxrunner.v1 import runner_pb2 as pb
from support.harness import Server, failure

PATH = "/models/fake"
"""Path of every fake model."""

HELLO = pb.ChatMessage(role=pb.ROLE_USER, content="hi")

REQUESTS: dict[str, Callable[[str], Message]] = {
    "Completion": lambda model: pb.CompletionRequest(
        prompt="hi", options=pb.CompletionOptions(num_predict=2), model=model
    ),
    "Tokenize": lambda model: pb.TokenizeRequest(content="hi", model=model),
    "Detokenize": lambda model: pb.DetokenizeRequest(token_ids=[104], model=model),
    "Chat": lambda model: pb.ChatRequest(
        messages=[HELLO], options=pb.CompletionOptions(num_predict=2), model=model
    ),
    "RenderChat": lambda model: pb.RenderChatRequest(messages=[HELLO], model=model),
    "Status": lambda model: pb.StatusRequest(model=model),
    "WatchStatus": lambda model: pb.WatchStatusRequest(model=model),
    "Trim": lambda model: pb.TrimRequest(model=model),
    "Unload": lambda model: pb.UnloadRequest(model=model),
}

every_rpc = pytest.mark.parametrize("rpc", REQUESTS)


async def answer(server: Server, rpc: str, model: str) -> None:
    call = getattr(server.stub, rpc)(REQUESTS[rpc](model), timeout=20)
    if rpc in ("Chat", "Completion"):
        assert [message async for message in call][-1].done
    elif rpc == "WatchStatus":
        message = await call.read()
        assert message.status.model.name == "org/name"
        call.cancel()
    else:
        await call


@every_rpc
@pytest.mark.parametrize("name", ["", "org/name", PATH])
async def test_the_loaded_model_may_be_named(server: Server, rpc: str, name: str) -> None:
    await server.load("org/name")
    await answer(server, rpc, name)


@every_rpc
async def test_another_model_is_refused_by_name(server: Server, rpc: str) -> None:
    await server.load("org/name")
    for name in ("org/other", "name", "/models", "ORG/NAME", " ", "org/name\n"):
        problem = await failure(answer(server, rpc, name))
        assert (problem.code, problem.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_NOT_LOADED",
        )
        assert problem.metadata == {"model": name}
        assert repr("org/name") in problem.message
        assert repr(name) in problem.message
    assert (await server.status()).model.name == "org/name"
    assert await server.text(num_predict=2)


@every_rpc
async def test_a_model_is_not_loaded_by_naming_it(server: Server, rpc: str) -> None:
    problem = await failure(answer(server, rpc, "org/name"))
    assert (problem.reason, problem.metadata) == ("MODEL_NOT_LOADED", {"model": "org/name"})
    assert "Load" in problem.message


async def test_a_long_name_does_not_hide_the_loaded_one(loaded: Server) -> None:
    problem = await failure(answer(loaded, "Status", "x" * 1_000_000))
    assert "'fake'" in problem.message
    assert problem.detail_bytes < 2048


async def test_status_by_name_answers_while_the_runner_stops(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = loaded.start()
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    loaded.app.engine.stop()
    status = await loaded.stub.Status(pb.StatusRequest(model="fake"))
    assert status.state == pb.STATE_STOPPING
    loaded.backend.step_gate.open()
    assert (await failure(call)).reason == "SHUTTING_DOWN"


async def test_busy_comes_before_the_name(server: Server) -> None:
    server.backend.load_gate.shut()
    load = asyncio.ensure_future(server.load("org/name"))
    await server.thread(server.backend.load_gate.wait_arrival)
    for rpc in ("Trim", "Unload"):
        assert (await failure(answer(server, rpc, "org/other"))).reason == "BUSY"
    problem = await failure(answer(server, "Completion", "org/name"))
    assert "is being loaded" in problem.message
    server.backend.load_gate.open()
    await load
    await answer(server, "Completion", "org/name")
