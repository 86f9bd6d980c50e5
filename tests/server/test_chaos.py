"""Every operation at once, in random order from fixed seeds: nothing hangs or is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import DEADLINE_SECONDS
from support.harness import Server, StartServer, eventually, problem_of
from support.sweeps import sampled

EXPECTED = {
    "MODEL_NOT_LOADED",
    "BUSY",
    "SHUTTING_DOWN",
    "QUEUE_FULL",
    "GENERATION_FAILED",
    "INVALID_FIELD",
}


class Visitor:
    """Client making one random call after another."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.draw = random.Random(seed)  # noqa: S311 - chooses what to do
        self.ended: list[str] = []

    async def run(self, count: int) -> None:
        """Make ``count`` calls and record their outcomes."""
        things: list[tuple[Callable[[], Awaitable[object]], int]] = [
            (self._complete, 10),
            (self._cancel, 6),
            (self._load, 2),
            (self._cancelled_load, 2),
            (self._unload, 1),
            (self.server.status, 3),
            (self._tokenize, 2),
            (self._wrong, 1),
        ]
        for _ in range(count):
            thing = self.draw.choices([t for t, _ in things], [w for _, w in things])[0]
            try:
                await thing()
                self.ended.append("OK")
            except grpc.aio.AioRpcError as error:
                self.ended.append(problem_of(error).reason)

    async def _complete(self) -> None:
        prompt = "p" * self.draw.choice([1, 40, 400])
        messages = await self.server.complete(prompt, num_predict=self.draw.choice([1, 8, 60]))
        assert [message.done for message in messages].count(True) == 1

    async def _cancel(self) -> None:
        call = self.server.start("p" * self.draw.choice([1, 300]))
        messages = aiter(call)
        for _ in range(self.draw.choice([0, 1, 2])):
            await anext(messages, None)
        call.cancel()

    async def _load(self) -> None:
        await self.server.load(parallel=self.draw.choice([1, 2, 4]))

    async def _cancelled_load(self) -> None:
        load = self.server.stub.Load(pb.LoadRequest(model="fake"))
        await self.server.status()
        load.cancel()

    async def _unload(self) -> None:
        await self.server.stub.Unload(pb.UnloadRequest())

    async def _tokenize(self) -> None:
        await self.server.stub.Tokenize(pb.TokenizeRequest(content="text"))

    async def _wrong(self) -> None:
        await self.server.complete(temperature=-1.0)


@pytest.mark.parametrize("seed", sampled([1, 2, 3], [1]))
async def test_random_calls_from_many_clients_leave_nothing(
    start_server: StartServer, seed: int
) -> None:
    server = await start_server(max_queued=4)
    tasks = len(asyncio.all_tasks())
    await server.load()
    visitors = [Visitor(server, 100 * seed + i) for i in range(12)]
    async with asyncio.timeout(3 * DEADLINE_SECONDS):
        await asyncio.gather(*(visitor.run(40) for visitor in visitors))
    ended = {reason for visitor in visitors for reason in visitor.ended}
    assert ended <= EXPECTED | {"OK"}
    assert "OK" in ended
    await eventually(lambda: server.view.model_command is None)
    await server.settled()
    await eventually(lambda: not server.view.command_count)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    await server.assert_nothing_left()
    await server.load()
    assert await server.text(num_predict=5)
    status = await server.status()
    assert (status.state, status.running_count, status.queued_count) == (pb.STATE_ACTIVE, 0, 0)
