"""The effects of the server's gRPC options."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from support.fakes import CONTEXT_LENGTH
from support.harness import Server, failure

PINGS = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SILENT_SECONDS = 6.5
"""A default server closes the connection within six pings, sent at most once a second."""


@pytest.mark.slow
async def test_a_silent_stream_may_be_pinged(loaded: Server) -> None:
    async with grpc.aio.insecure_channel(loaded.ready.target, options=PINGS) as channel:
        client = Server(loaded.app, loaded.backend, channel, loaded.ready)
        loaded.backend.step_gate.shut()
        call = client.start(num_predict=3)
        await loaded.thread(loaded.backend.step_gate.wait_arrival)
        # The silence itself is under test, so the sleep must be real.
        await asyncio.sleep(SILENT_SECONDS)
        loaded.backend.step_gate.open()
        assert [message async for message in call][-1].eval_count == 3


async def test_a_prompt_of_megabytes_is_read(loaded: Server) -> None:
    size = 5 * 2**20
    problem = await failure(loaded.start("x" * size))
    assert problem.reason == "PROMPT_TOO_LONG"
    assert problem.metadata["promptTokens"] == str(size + 1)
    assert problem.metadata["contextLength"] == str(CONTEXT_LENGTH)


async def test_other_calls_are_answered_while_a_long_prompt_is_tokenized(loaded: Server) -> None:
    calls = [loaded.start("x" * (20 * 2**20)) for _ in range(2)]
    problems = asyncio.gather(*(failure(call) for call in calls))
    answered = 0
    while not problems.done():
        await loaded.status()
        answered += 1
    assert {problem.reason for problem in await problems} == {"PROMPT_TOO_LONG"}
    assert answered >= 1


async def test_a_connection_carries_a_thousand_calls(loaded: Server) -> None:
    for _ in range(20):
        answers = await asyncio.gather(*(loaded.status() for _ in range(50)))
        assert len({answer.runner_id for answer in answers}) == 1
