"""Several runners behind one channel: gRPC's own load balancing with our health (scaling.md)."""

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
from runner_common.handshake import SERVICE_NAME
from support.fakes import DEADLINE_SECONDS
from support.harness import Server, StartServer, eventually

CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE_NAME},
}


@pytest.fixture
async def three(start_server: StartServer) -> list[Server]:
    """Three servers on ports."""
    return [await start_server(listen="127.0.0.1:0") for _ in range(3)]


class Balanced:
    """One channel to several servers."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = runner_pb2_grpc.RunnerServiceStub(channel)

    async def asked(self, count: int) -> Counter[str]:
        """How many of so many calls each server got."""
        calls = [
            self._stub.Status(pb.StatusRequest(), timeout=DEADLINE_SECONDS) for _ in range(count)
        ]
        return Counter([answer.runner_id for answer in await asyncio.gather(*calls)])

    async def reaches(self, count: int) -> bool:
        """Whether calls go to so many servers."""
        return len(await self.asked(2 * count + 2)) == count


@asynccontextmanager
async def balanced(servers: list[Server], config: object = CONFIG) -> AsyncIterator[Balanced]:
    target = "ipv4:" + ",".join(server.ready.address for server in servers)
    options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options) as channel:
        yield Balanced(channel)


async def drain(server: Server) -> None:
    """As at the beginning of its end: it is there, and takes no new work."""
    await server.app._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_calls_go_around(three: list[Server]) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches(3))
        assert sorted((await channel.asked(30)).values()) == [10, 10, 10]


async def test_one_that_is_stopping_gets_none(three: list[Server]) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches(3))
        await drain(three[0])
        await eventually(lambda: channel.reaches(2))
        gone = (await three[0].status()).runner_id
        assert gone not in await channel.asked(20)


async def test_without_health_it_would(three: list[Server]) -> None:
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    async with balanced(three, config) as channel:
        await eventually(lambda: channel.reaches(3))
        await drain(three[0])
        assert (await three[0].status()).runner_id in await channel.asked(20)


async def test_one_that_is_gone_gets_none_and_no_call_fails(three: list[Server]) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches(3))
        await three[0].app.close()
        for _ in range(20):
            assert sum((await channel.asked(4)).values()) == 4
        assert await channel.reaches(2)


async def test_one_that_comes_back_gets_its_share(
    three: list[Server], start_server: StartServer
) -> None:
    async with balanced(three) as channel:
        await eventually(lambda: channel.reaches(3))
        await three[0].app.close()
        await eventually(lambda: channel.reaches(2))
        await start_server(listen=three[0].ready.address)
        await eventually(lambda: channel.reaches(3))
