"""Flood a server with 200 connections and 1,000 queued requests; afterwards nothing is left."""

from __future__ import annotations

import asyncio
import gc
import logging
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
import psutil
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from support.fakes import DEADLINE_SECONDS
from support.harness import LIMITS, Problem, Server, StartServer, eventually, failure, problem_of

CONNECTIONS = 200
QUEUED = 1000
PARALLEL = 8
TOKENS = 6

RETRY_FACTOR = 4.0
"""Most times the delay answered by a full queue may exceed the time the queue takes to drain."""

MOST_TRIES = 4
"""Most tries of a client that waits for the answered delay before each new one."""

_FILL_SECONDS = 60.0
"""Most seconds for a thousand calls to arrive; only a bug reaches this."""

FULL_QUEUE_BYTES = 128 * 2**20
"""Most that 200 connections and 1,208 calls may take, both ends in this one process."""

GROWTH_BYTES = 48 * 2**20
"""Most that floods may leave behind; the heap varies by some 20 MiB here."""

GROWTH_OBJECTS = 1800
"""The same limit in Python objects, which vary less: half an object per request."""


@asynccontextmanager
async def connected(server: Server, count: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Open channels, each with its own established connection."""
    options = [*LIMITS, ("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(server.ready.target, options=options)
            )
            for _ in range(count)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        yield channels


def start_completion(
    channel: grpc.aio.Channel, number: int
) -> grpc.aio.UnaryStreamCall[pb.CompletionRequest, pb.CompletionResponse]:
    options = pb.CompletionOptions(num_predict=TOKENS, seed=number)
    request = pb.CompletionRequest(prompt=f"number {number}", options=options)
    return runner_pb2_grpc.RunnerServiceStub(channel).Completion(request, timeout=60)


async def ends_whole(call: grpc.aio.Call) -> bool:
    """Read a stream and return whether the final message arrived."""
    assert isinstance(call, grpc.aio.UnaryStreamCall)
    messages = [message async for message in call]
    return bool(messages[-1].done and messages[-1].eval_count == TOKENS)


@dataclass
class Flood:
    """Outcome of one flood.

    Attributes:
        refused: The errors of the calls sent while the queue was full.
        whole: How many of the earlier streams ended with their final message.
        drain_seconds: From the first step to the last stream's end.
        full_bytes: The resident set of the process with a full queue.
    """

    refused: list[Problem]
    whole: int
    drain_seconds: float
    full_bytes: int


async def flood(server: Server, channels: list[grpc.aio.Channel]) -> Flood:
    """Fill the queue while steps are held, get one refusal per connection, then drain."""
    gate = server.backend.step_gate
    gate.shut()
    calls = [start_completion(channels[i % len(channels)], i) for i in range(PARALLEL + QUEUED)]

    def all_wait() -> bool:
        assert [repr(call) for call in calls if call.done()] == []
        return registered_count(server) == len(calls)

    await eventually(all_wait, within=_FILL_SECONDS)
    refused = await asyncio.gather(*(failure(start_completion(channel, 0)) for channel in channels))
    full_bytes = resident_bytes()
    begin = time.monotonic()
    gate.open()
    whole = await asyncio.gather(*(ends_whole(call) for call in calls))
    return Flood(list(refused), sum(whole), time.monotonic() - begin, full_bytes)


def registered_count(server: Server) -> int:
    return server.view.request_count


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def object_count() -> int:
    gc.collect()
    return len(gc.get_objects())


async def full_batch_steps(server: Server) -> int:
    """Return the number of steps of a full batch: a speed measured without a clock."""
    gate, before = server.backend.step_gate, server.backend.steps
    gate.shut()
    calls = [server.start("0", num_predict=20)]
    await server.thread(gate.wait_arrival)
    calls += [server.start(str(i), num_predict=20) for i in range(1, PARALLEL)]
    await eventually(lambda: registered_count(server) == PARALLEL)
    gate.open()
    for call in calls:
        assert [message async for message in call][-1].eval_count == 20
    return server.backend.steps - before


async def test_a_full_queue_is_bounded_answers_a_delay_and_leaves_nothing(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    # When two of gRPC's readers in one process wake for one event, they log tracebacks, and pytest
    # keeps each of them.
    caplog.set_level(logging.CRITICAL, logger="asyncio")
    server = await start_server(max_queued=QUEUED)
    await server.load(parallel=PARALLEL)
    steps = await full_batch_steps(server)
    before = resident_bytes()
    async with connected(server, CONNECTIONS) as channels:
        first = await flood(server, channels)
        resident, objects = resident_bytes(), object_count()
        second = await flood(server, channels)
        third = await flood(server, channels)
        fourth = await flood(server, channels)
        assert resident_bytes() - resident < GROWTH_BYTES
        assert object_count() - objects < GROWTH_OBJECTS
    floods = [first, second, third, fourth]
    assert [each.whole for each in floods] == [PARALLEL + QUEUED] * 4
    assert first.full_bytes - before < FULL_QUEUE_BYTES
    for each in floods:
        assert_refused(each)
    # The first flood met a server without measurements. One of the others may have been held up.
    assert statistics.median(map(delay_factor, floods[1:])) <= RETRY_FACTOR
    await server.settled()
    await server.assert_nothing_left()
    assert await full_batch_steps(server) == steps


def assert_refused(flood: Flood) -> None:
    assert len(flood.refused) == CONNECTIONS
    for problem in flood.refused:
        assert (problem.code, problem.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert problem.kinds == ("ErrorInfo", "RetryInfo")
        assert problem.retry_seconds is not None
        assert 0.1 <= problem.retry_seconds <= 60
        assert QUEUED <= int(problem.metadata["queuedCount"]) <= QUEUED + PARALLEL


def delay_factor(flood: Flood) -> float:
    """Return the longest answered delay as a multiple of the real drain time."""
    return max(problem.retry_seconds or 0.0 for problem in flood.refused) / flood.drain_seconds


async def test_a_burst_of_calls_is_accepted_whole(start_server: StartServer) -> None:
    """Take 2,500 calls; by default gRPC cancels some of more than 1,000, at random."""
    server = await start_server()
    async with connected(server, 20) as channels:
        stubs = [runner_pb2_grpc.RunnerServiceStub(channel) for channel in channels]
        asked = [stubs[i % len(stubs)].Status(pb.StatusRequest(), timeout=60) for i in range(2500)]
        assert len({answer.runner_id for answer in await asyncio.gather(*asked)}) == 1


async def test_a_client_that_waits_for_the_delay_is_served(start_server: StartServer) -> None:
    server = await start_server(max_queued=QUEUED)
    await server.load(parallel=PARALLEL)
    async with connected(server, CONNECTIONS) as channels:
        await flood(server, channels)
        gate = server.backend.step_gate
        gate.shut()
        calls = [start_completion(channels[i % CONNECTIONS], i) for i in range(PARALLEL + QUEUED)]
        await eventually(lambda: registered_count(server) == len(calls))
        all_refused = asyncio.Barrier(CONNECTIONS + 1)
        tries = asyncio.gather(*(tries_until_served(channel, all_refused) for channel in channels))
        await all_refused.wait()
        gate.open()
        assert all(await asyncio.gather(*(ends_whole(call) for call in calls)))
        assert max(await tries) <= MOST_TRIES


async def tries_until_served(channel: grpc.aio.Channel, all_refused: asyncio.Barrier) -> int:
    """Return the number of tries until served, each after the delay answered before."""
    problem = await failure(start_completion(channel, 1))
    await all_refused.wait()
    for tries in range(2, MOST_TRIES + 1):
        assert problem.reason == "QUEUE_FULL"
        assert problem.retry_seconds is not None
        assert problem.retry_seconds < DEADLINE_SECONDS
        # The delay itself is under test, so the sleep must be real.
        await asyncio.sleep(problem.retry_seconds)
        try:
            assert await ends_whole(start_completion(channel, tries))
        except grpc.aio.AioRpcError as error:
            problem = problem_of(error)
        else:
            return tries
    return MOST_TRIES + 1
