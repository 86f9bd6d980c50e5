"""The delay answered by a full queue depends only on the time requests occupy slots."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from support.harness import LIMITS, Server, eventually, failure, tokens

LITTLE_AHEAD: list[tuple[str, Any]] = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 << 10),
]


class Clock:
    """Clock of the engine, which a test can put forward."""

    ahead_seconds = 0.0

    def monotonic(self) -> float:
        """Return the monotonic time plus ``ahead_seconds``."""
        return time.monotonic() + self.ahead_seconds


async def test_the_time_a_reader_stops_does_not_lengthen_the_delay(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in ("request", "generation_request"):
        monkeypatch.setattr(f"runner_server.engine.{module}.time", clock)
    await server.load(parallel=1)
    for _ in range(30):
        await server.complete(num_predict=1)
    options = [*LIMITS, *LITTLE_AHEAD, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.ready.target, options=options) as channel:
        request = pb.CompletionRequest(
            prompt="slow", logprobs=20, options=pb.CompletionOptions(num_predict=3000)
        )
        messages = aiter(runner_pb2_grpc.RunnerServiceStub(channel).Completion(request))
        first = await anext(messages)
        await eventually(lambda: server.backend.preemptions > 0)
        # The slot is free, and other requests are served meanwhile.
        await server.complete(num_predict=1)
        clock.ahead_seconds = 500
        rest = [message async for message in messages]
    assert len(tokens([first, *rest])) == 3000
    assert rest[-1].eval_duration.ToSeconds() >= 500
    assert await answered_delay(server) < 10


async def answered_delay(server: Server) -> float:
    """Return the delay answered while one request runs and the queue is full."""
    server.app.engine._registry._max_queued = 1
    server.backend.step_gate.shut()
    calls = [server.start(str(i), num_predict=1) for i in range(2)]
    await eventually(lambda: server.view.request_count == 2)
    problem = await failure(server.start())
    server.backend.step_gate.open()
    for call in calls:
        assert [message async for message in call][-1].done
    assert problem.retry_seconds is not None
    return problem.retry_seconds
