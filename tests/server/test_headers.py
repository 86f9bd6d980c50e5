"""An accepted completion gets headers at once; a refused one gets only a status."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

import support.plain_http2 as plain_http2
from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import SERVICE_NAME
from support.fakes import FakeBackend
from support.harness import Server, StartServer, eventually, failure

COMPLETION = f"{SERVICE_NAME}/Completion"


def _request(prompt: str = "x", **options: Any) -> pb.CompletionRequest:
    return pb.CompletionRequest(prompt=prompt, options=pb.CompletionOptions(**options))


async def _call_by_hand(server: Server, data: bytes) -> plain_http2.Answer:
    port = int(server.ready.address.rpartition(":")[2])
    return await asyncio.to_thread(plain_http2.call, port, COMPLETION, data)


@pytest.fixture
async def full(start_server: StartServer) -> Server:
    """A server with one slot and a queue of one, held before the first step."""
    server = await start_server(
        FakeBackend(kv_budget_bytes=100_000), listen="127.0.0.1:0", max_queued=1
    )
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    return server


async def test_a_queued_completion_has_headers(full: Server) -> None:
    running, queued = full.start(num_predict=1), full.start(num_predict=1)
    await full.thread(full.backend.step_gate.wait_arrival)
    # Neither has a token, and the engine makes no step.
    for call in (running, queued):
        await call.initial_metadata()
    await eventually(lambda: full.view.request_count == 2)
    assert full.backend.steps == 0
    full.backend.step_gate.open()
    for call in (running, queued):
        assert [message async for message in call][-1].eval_count == 1


async def test_an_accepted_completion_has_headers_before_its_status(full: Server) -> None:
    full.backend.step_gate.open()
    answer = await _call_by_hand(full, _request(num_predict=1).SerializeToString())
    assert (answer.status, answer.is_trailers_only) == (0, False)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (_request("").SerializeToString(), grpc.StatusCode.INVALID_ARGUMENT),
        (_request(top_k=-1).SerializeToString(), grpc.StatusCode.INVALID_ARGUMENT),
        (_request("x" * 5000).SerializeToString(), grpc.StatusCode.INVALID_ARGUMENT),
        (_request().SerializeToString() + b"\x88\x06\x01", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (_request(num_predict=2000).SerializeToString(), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["prompt", "option", "too long", "unknown field", "no message", "no memory"],
)
async def test_a_refused_completion_has_only_a_status(
    full: Server, data: bytes, code: grpc.StatusCode
) -> None:
    answer = await _call_by_hand(full, data)
    assert (answer.status, answer.is_trailers_only) == (code.value[0], True)


async def test_a_full_queue_answers_with_only_a_status(full: Server) -> None:
    calls = [full.start(num_predict=1) for _ in range(2)]
    for call in calls:
        await call.initial_metadata()
    answer = await _call_by_hand(full, _request(num_predict=1).SerializeToString())
    assert answer.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert answer.is_trailers_only
    for call in calls:
        call.cancel()


async def test_a_missing_model_answers_with_only_a_status(start_server: StartServer) -> None:
    server = await start_server(listen="127.0.0.1:0")
    answer = await _call_by_hand(server, _request().SerializeToString())
    assert answer.status == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert answer.is_trailers_only


async def test_a_completion_with_headers_can_still_fail(full: Server) -> None:
    running, queued = full.start(num_predict=1), full.start(num_predict=1)
    for call in (running, queued):
        await call.initial_metadata()
    full.app.engine.stop()
    full.backend.step_gate.open()
    problem = await failure(queued)
    assert (problem.code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    running.cancel()
