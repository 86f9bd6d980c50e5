"""Full queues, failed steps and arbitrary bytes: the errors, and nothing left over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from runner_server.telemetry.methods import VLLM_SERVICE_NAME
from support.call_outcomes import ANSWER_SECONDS, reason_of
from support.fakes import DEADLINE_SECONDS, FakeBackend
from support.harness import Server, StartServer, failure
from support.hostile_requests import damaged, messages

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

SOUND = pb.GenerateRequest(
    text="hi", sampling_params=pb.SamplingParams(max_tokens=8)
).SerializeToString()
"""Valid fields, put before generated ones; some requests then lack nothing."""

_fields = messages(pb.GenerateRequest.DESCRIPTOR)
requests = st.one_of(_fields, _fields.map(lambda data: SOUND + data), damaged(_fields))


def generate(server: Server, **params: Any) -> Any:
    request = pb.GenerateRequest(
        text="hello", stream=True, sampling_params=pb.SamplingParams(**params)
    )
    stub = vllm_engine_pb2_grpc.VllmEngineStub(server.channel)
    return stub.Generate(request, timeout=DEADLINE_SECONDS)


async def read_to_end(call: Any) -> None:
    while await call.read():
        pass


async def test_a_queue_without_room_for_all_answers_refuses_the_call(
    start_server: StartServer,
) -> None:
    server = await start_server(FakeBackend(), vllm=True, max_queued=3)
    await server.load(parallel=1)
    problem = await failure(generate(server, n=8, max_tokens=900))
    assert (problem.code, problem.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    await server.settled()
    await server.assert_nothing_left()


async def test_a_failed_step_ends_a_call_with_several_answers(start_server: StartServer) -> None:
    server = await start_server(FakeBackend(), vllm=True)
    await server.load(context_length=100_000)
    call = generate(server, n=3, max_tokens=90_000)
    await call.read()
    server.backend.failures.append(ValueError("broken"))
    assert (await failure(read_to_end(call))).reason == "GENERATION_FAILED"
    await server.settled()
    await server.assert_nothing_left()


async def send(server: Server, data: bytes) -> str:
    """Send a request, check the answers and return the reason of an error, or OK."""
    call: Any = server.channel.unary_stream(
        f"/{VLLM_SERVICE_NAME}/Generate", response_deserializer=pb.GenerateResponse.FromString
    )
    counts: dict[int, int] = {}
    ended = {}
    try:
        async for answer in call(data, timeout=ANSWER_SECONDS):
            if answer.HasField("chunk"):
                index, ids = answer.chunk.index, answer.chunk.token_ids
            else:
                index, ids = answer.complete.index, answer.complete.output_ids
                ended[index] = answer.complete.completion_tokens
            counts[index] = counts.get(index, 0) + len(ids)
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    assert counts == ended
    assert sorted(ended) == list(range(len(ended)))
    return "OK"


@pytest.fixture
async def target(start_server: StartServer) -> AsyncIterator[Server]:
    """A server on the fake model library, checked to be empty after the test."""
    server = await start_server(vllm=True)
    await server.load(context_length=512)
    yield server
    await server.settled()
    await server.assert_nothing_left()


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=requests)
async def test_any_request_is_answered_from_the_error_table(target: Server, data: bytes) -> None:
    event(await send(target, data))
    assert not (await target.status()).last_error
