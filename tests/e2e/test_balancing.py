"""Client-side load balancing of gRPC over several runners, by health (docs/scaling.md)."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_common.contract import SERVICE_NAME
from support.fakes import DEADLINE_SECONDS
from support.harness import Server, StartServer, eventually

CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE_NAME},
}


@pytest.fixture
async def three(start_server: StartServer) -> list[Server]:
    """Start three servers on TCP ports."""
    return [await start_server(listen="127.0.0.1:0") for _ in range(3)]


class Balanced:
    """A channel to several servers."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = runner_pb2_grpc.RunnerServiceStub(channel)

    async def calls_by_server(self, count: int) -> Counter[str]:
        """Make ``count`` calls and return the number of calls answered by each server."""
        calls = [
            self._stub.Status(pb.StatusRequest(), timeout=DEADLINE_SECONDS) for _ in range(count)
        ]
        return Counter([answer.runner_id for answer in await asyncio.gather(*calls)])

    async def reaches_servers(self, count: int) -> bool:
        """Return whether calls go to exactly ``count`` servers."""
        return len(await self.calls_by_server(2 * count + 2)) == count


@asynccontextmanager
async def balanced(servers: list[Server], config: object = CONFIG) -> AsyncIterator[Balanced]:
    target = "ipv4:" + ",".join(server.ready.address for server in servers)
    options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options) as channel:
        yield Balanced(channel)


async def drain(server: Server) -> None:
    """Report NOT_SERVING, as a server does when a shutdown begins."""
    await server.app._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_calls_are_spread_evenly(three: list[Server]) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches_servers(3))
        assert sorted((await channel.calls_by_server(30)).values()) == [10, 10, 10]


async def test_a_stopping_server_gets_no_calls(three: list[Server]) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches_servers(3))
        await drain(three[0])
        await eventually(lambda: channel.reaches_servers(2))
        gone = (await three[0].status()).runner_id
        assert gone not in await channel.calls_by_server(20)


async def test_without_health_checks_a_stopping_server_gets_calls(three: list[Server]) -> None:
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    async with balanced(three, config) as channel:
        await eventually(lambda: channel.reaches_servers(3))
        await drain(three[0])
        assert (await three[0].status()).runner_id in await channel.calls_by_server(20)


async def test_a_stopped_server_gets_no_calls_and_none_fail(three: list[Server]) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches_servers(3))
        await three[0].app.close()
        for _ in range(20):
            assert sum((await channel.calls_by_server(4)).values()) == 4
        assert await channel.reaches_servers(2)


async def test_a_restarted_server_gets_calls_again(
    three: list[Server], start_server: StartServer
) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches_servers(3))
        await three[0].app.close()
        await eventually(lambda: channel.reaches_servers(2))
        await start_server(listen=three[0].ready.address)
        await eventually(lambda: channel.reaches_servers(3))
