"""Arbitrary bytes to the gateway's rpcs: answers from the error table, no harm to neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from runner_server.telemetry.methods import SMG_SERVICE_NAME
from support.call_outcomes import ANSWER_SECONDS, reason_of
from support.harness import Server, StartServer, running
from support.hostile_requests import damaged, messages

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")

from smg_grpc_proto import mlx_engine_pb2 as pb

CONTEXT_LENGTH = 512

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

SOUND = pb.GenerateRequest(
    text="hi", sampling_params=pb.SamplingParams(max_tokens=8)
).SerializeToString()
"""Valid fields, put before generated ones; some requests then lack nothing."""

_fields = messages(pb.GenerateRequest.DESCRIPTOR)
requests = st.one_of(_fields, _fields.map(lambda data: SOUND + data), damaged(_fields))


def hostile(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


async def send(server: Server, data: bytes) -> str:
    """Send a request, check the answer and return the reason of an error, or OK."""
    read = pb.GenerateResponse.FromString
    generate: Any = server.channel.unary_stream(
        f"/{SMG_SERVICE_NAME}/Generate", response_deserializer=read
    )
    try:
        answers = [answer async for answer in generate(data, timeout=ANSWER_SECONDS)]
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    *chunks, last = answers
    assert all(answer.HasField("chunk") for answer in chunks)
    streamed = sum(len(answer.chunk.token_ids) for answer in chunks)
    assert streamed + len(last.complete.output_ids) == last.complete.completion_tokens
    return "OK"


async def assert_neighbour_unharmed(server: Server, batch: list[bytes]) -> None:
    options = {"seed": 7, "num_predict": 30}
    alone = await server.text("neighbour", **options)
    beside, *endings = await asyncio.gather(
        server.text("neighbour", **options), *(send(server, data) for data in batch)
    )
    assert beside == alone
    for ending in endings:
        event(ending)
    assert not (await server.status()).last_error


@pytest.fixture
async def target(start_server: StartServer) -> AsyncIterator[Server]:
    """A server on the fake model library, checked to be empty after the test."""
    server = await start_server(smg=True)
    await server.load(context_length=CONTEXT_LENGTH)
    yield server
    await server.settled()
    await server.assert_nothing_left()


@hostile(100)
@given(batch=st.lists(requests, min_size=1, max_size=6))
async def test_any_request_is_answered_from_the_error_table(
    target: Server, batch: list[bytes]
) -> None:
    await assert_neighbour_unharmed(target, batch)


@hostile(60)
@given(data=messages(pb.AbortRequest.DESCRIPTOR))
async def test_any_abort_is_answered(target: Server, data: bytes) -> None:
    abort: Any = target.channel.unary_unary(f"/{SMG_SERVICE_NAME}/Abort")
    ending = "OK"
    try:
        await abort(data, timeout=ANSWER_SECONDS)
    except grpc.aio.AioRpcError as error:
        ending = reason_of(error)
    assert ending in {"OK", "INVALID_FIELD"}


@pytest.fixture
async def real(model_dir: Callable[..., Path], socket_dir: Path) -> AsyncIterator[Server]:
    """A server with a small model under real MLX."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    from runner_server.mlx_backend import MlxBackend

    backend: Any = MlxBackend()
    async with running(socket_dir, backend, smg=True) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(model_dir()), context_length=CONTEXT_LENGTH)
        yield server


@pytest.mark.mlx
@hostile(25)
@given(batch=st.lists(requests, min_size=1, max_size=6))
async def test_any_request_is_answered_from_the_error_table_with_mlx(
    real: Server, batch: list[bytes]
) -> None:
    await assert_neighbour_unharmed(real, batch)
