"""Flood a server process with MLX; connections, queue, memory and speed return to normal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from support.harness import LIMITS, problem_of
from support.server_child import Child, running

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

MODEL = Path(__file__).parents[2] / "runner_server" / "demo" / "model"
CONNECTIONS = 120
QUEUED = 80
PARALLEL = 8
REQUESTS = 180
TOKENS = 12

RETRY_FACTOR = 4.0
"""Most times the delay answered by a full queue may exceed the time the queue takes to drain."""

GROWTH_BYTES = 24 * 2**20
"""Most that the second flood may leave behind."""

MORE_DESCRIPTORS = 4
"""Most that may stay open after all connections are closed."""

OPTIONS = [*LIMITS, ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    """A server where equal requests take equal steps: no prefix cache and no drafts."""
    args = ["--model", str(MODEL), "--parallel", str(PARALLEL), "--max-queued", str(QUEUED)]
    args += ["--prefix-cache-bytes", "0", "--draft-tokens", "0"]
    with running(tmp_path, *args) as server:
        server.wait_for(lambda: server.status().state == pb.STATE_ACTIVE)
        yield server


def greedy_steps(child: Child) -> int:
    """Return the number of steps of a lone completion: a speed measured without a clock."""
    before = child.status().step_count
    options = pb.CompletionOptions(num_predict=40, temperature=0, logit_bias={0: -100, 1: -100})
    request = pb.CompletionRequest(prompt="def add(a, b):", options=options)
    *_, last = child.stub.Completion(request, timeout=30)
    assert last.eval_count == 40
    return child.status().step_count - before


async def flood(target: str) -> float:
    """Send more than the queue holds over many connections.

    Returns:
        Seconds until the last accepted completion ended.
    """
    channels = [grpc.aio.insecure_channel(target, options=OPTIONS) for _ in range(CONNECTIONS)]
    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        begin = time.monotonic()
        ends = await asyncio.gather(
            *(outcome(channels[i % CONNECTIONS], i) for i in range(REQUESTS))
        )
        seconds = time.monotonic() - begin
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    delays = [delay for delay in ends if delay is not None]
    # Running and queued requests finish; the others are refused with a delay.
    assert REQUESTS - len(delays) >= PARALLEL + QUEUED
    assert delays
    assert all(0 < delay <= max(0.1, RETRY_FACTOR * seconds) for delay in delays)
    return seconds


async def outcome(channel: grpc.aio.Channel, number: int) -> float | None:
    """Return None for a whole completion, or the delay of a refused one."""
    options = pb.CompletionOptions(
        num_predict=TOKENS, temperature=0.8, seed=number, logit_bias={0: -100, 1: -100}
    )
    request = pb.CompletionRequest(prompt=f"def number_{number}(", options=options)
    call = runner_pb2_grpc.RunnerServiceStub(channel).Completion(request, timeout=60)
    try:
        messages = [message async for message in call]
    except grpc.aio.AioRpcError as error:
        problem = problem_of(error)
        assert problem.reason == "QUEUE_FULL"
        return problem.retry_seconds
    assert messages[-1].done
    assert messages[-1].eval_count == TOKENS
    return None


async def test_a_flood_passes_and_leaves_nothing(child: Child) -> None:
    process = psutil.Process(child.process.pid)
    steps = greedy_steps(child)
    await flood(child.ready.target)
    resident = process.memory_info().rss
    descriptors = process.num_fds()
    await flood(child.ready.target)
    assert process.memory_info().rss - resident < GROWTH_BYTES
    status = child.status()
    assert (status.running_count, status.queued_count) == (0, 0)
    child.wait_for(lambda: process.num_fds() <= descriptors + MORE_DESCRIPTORS)
    assert greedy_steps(child) == steps
