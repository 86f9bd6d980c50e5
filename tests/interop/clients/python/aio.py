"""A client on grpcio's asyncio API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from interop.clients.python import shared
from interop.clients.python.shared import Json
from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc


class Call:
    """A call in progress."""

    def __init__(self, session: Session, step: Json) -> None:
        method: Any = getattr(session.stub, step["rpc"])
        self._messages: list[Any] = []
        self.handle = method(
            shared.request_of(step),
            metadata=session.metadata,
            timeout=step.get("timeout_seconds", shared.CALL_SECONDS),
        )
        self._answers = self._read()

    async def _read(self) -> AsyncIterator[Any]:
        if isinstance(self.handle, grpc.aio.UnaryStreamCall):
            async for message in self.handle:
                yield message
        else:
            yield await self.handle

    async def read_until(self, count: int) -> None:
        """Read until ``count`` messages have arrived."""
        while len(self._messages) < count:
            self._messages.append(await anext(self._answers))

    async def finish(self) -> Json:
        """Read the call to the end."""
        try:
            async for message in self._answers:
                self._messages.append(message)
        except grpc.RpcError as error:
            return shared.failure(error, self._messages)
        return shared.success(self._messages)

    async def cancel(self) -> Json:
        """Cancel the call and return the end; reading on would raise ``CancelledError``."""
        self.handle.cancel()
        return shared.failure(await _Ended.of(self.handle), self._messages)


class _Ended:
    """The end of a call, with the interface of an ``RpcError``."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        self.code = lambda: code
        self.details = lambda: details
        self.trailing_metadata = lambda: trailers

    @classmethod
    async def of(cls, call: Any) -> _Ended:
        """Wait for the end of a call."""
        return cls(await call.code(), await call.details(), await call.trailing_metadata())


class Session:
    """One scenario on a separate channel."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self.stub: Any = runner_pb2_grpc.RunnerServiceStub(channel)
        self.metadata = metadata
        self._calls: dict[str, Call] = {}

    async def run(self, step: Json) -> Json:
        """Perform a step."""
        try:
            result: Json = await getattr(self, f"_{step['op']}")(step)
        except Exception as error:  # noqa: BLE001 - reported to the judge
            return shared.broken(error)
        return result

    async def _call(self, step: Json) -> Json:
        call = Call(self, step)
        if not step.get("watch_status"):
            return await call.finish()
        answer = asyncio.create_task(call.finish())
        statuses = [await self._status()]
        while not (await asyncio.wait([answer], timeout=shared.STATUS_SECONDS))[0]:
            statuses.append(await self._status())
        statuses.append(await self._status())
        return await answer | {"statuses": shared.plain(statuses)}

    async def _start(self, step: Json) -> Json:
        call = self._calls[step["as"]] = Call(self, step)
        await call.read_until(step.get("until_messages", 0))
        return {}

    async def _cancel(self, step: Json) -> Json:
        return await self._calls[step["of"]].cancel()

    async def _finish(self, step: Json) -> Json:
        return await self._calls[step["of"]].finish()

    async def _until_status(self, step: Json) -> Json:
        end = time.monotonic() + shared.UNTIL_STATUS_SECONDS
        while not shared.has_fields(status := await self._status(), step["fields"]):
            if time.monotonic() > end:
                break
            await asyncio.sleep(shared.STATUS_SECONDS)
        return shared.success([status])

    async def _status(self) -> pb.StatusResponse:
        status: pb.StatusResponse = await self.stub.Status(
            pb.StatusRequest(), metadata=self.metadata, timeout=shared.CALL_SECONDS
        )
        return status


async def main() -> None:
    """Run the scenarios."""
    scenarios, servers = shared.arguments()
    for scenario in scenarios:
        server = servers[scenario["server"]]
        options = shared.channel_options(scenario)
        async with grpc.aio.insecure_channel(server["address"], options) as channel:
            session = Session(channel, shared.metadata_of(scenario, server))
            shared.print_results(scenario, [await session.run(step) for step in scenario["steps"]])


if __name__ == "__main__":
    asyncio.run(main())
