"""Connection and calls of the asyncio client: everything that waits, expires or is cancelled.

``calls`` has the same names for the sync client, which is generated from the asyncio client.
"""

from __future__ import annotations

import asyncio
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from mlxrunner.v1 import runner_pb2_grpc
from runner_client.rpc import health
from runner_client.rpc.aio_stream import AsyncCompletionStream, raise_if_cancelled
from runner_client.rpc.base import LOAD_SECONDS, POLL_SECONDS, ClientBase
from runner_client.rpc.channel import open_aio_channel
from runner_client.rpc.trace import with_trace

if TYPE_CHECKING:
    from mlxrunner.v1 import runner_pb2 as pb
    from mlxrunner.v1.runner_pb2_grpc import RunnerServiceAsyncStub
    from runner_client.errors import RunnerError
    from runner_client.types import Timeouts, TlsFiles

    CompletionCall = grpc.aio.UnaryStreamCall[pb.CompletionRequest, pb.CompletionResponse]
    LoadCall = asyncio.Task[pb.LoadResponse]

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class ClientCalls(ClientBase):
    """Base of the asyncio client: a channel and the ways to call it."""

    def __init__(
        self,
        address: str,
        timeouts: Timeouts | None,
        token: str | None,
        tls: TlsFiles | None,
    ) -> None:
        super().__init__(address, timeouts, token, tls)
        self._streams: weakref.WeakSet[CompletionCall] = weakref.WeakSet()

    # The channel, stub and health method are created by the first call, because a channel binds
    # to the running event loop.

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return open_aio_channel(self.address, self._access.credentials)

    @cached_property
    def _stub(self) -> RunnerServiceAsyncStub:
        return runner_pb2_grpc.RunnerServiceStub(self._channel)

    @cached_property
    def _health(self) -> grpc.aio.UnaryUnaryMultiCallable[StringValue, Int32Value]:
        return self._channel.unary_unary(
            health.METHOD, StringValue.SerializeToString, Int32Value.FromString
        )

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_seconds: float | None = None,
    ) -> _Response:
        timeout = timeout_seconds or self.timeouts.call_seconds
        try:
            return await method(
                request, timeout=timeout, metadata=with_trace(self._access.metadata)
            )
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            raise await self._failure(error, timeout) from error

    async def _failure(
        self, error: BaseException, timeout_seconds: float | None = None
    ) -> RunnerError:
        return self._translated(error, timeout_seconds)

    def _start_load(self, request: pb.LoadRequest) -> LoadCall:
        return asyncio.create_task(self._call(self._stub.Load, request, LOAD_SECONDS))

    async def _poll_load(self, call: LoadCall) -> pb.LoadResponse | None:
        """Wait up to ``POLL_SECONDS`` for the reply; return None if the load is still running."""
        done, _ = await asyncio.wait((call,), timeout=POLL_SECONDS)
        return call.result() if done else None

    async def _end_load(self, call: LoadCall) -> None:
        """Cancel a load unless already finished."""
        call.cancel()
        # Wait for the call to end, and retrieve its exception so that asyncio does not log it.
        await asyncio.gather(call, return_exceptions=True)

    def _start_stream(self, request: pb.CompletionRequest) -> AsyncCompletionStream:
        try:
            call = self._stub.Completion(request, metadata=with_trace(self._access.metadata))
        except grpc.aio.UsageError as error:
            raise self._translated(error) from error
        self._streams.add(call)
        return AsyncCompletionStream(call, timeouts=self.timeouts, failure=self._failure)

    async def _disconnect(self) -> None:
        self._is_closed = True
        # Older grpcio (1.80, for one) does not end a stream that is being read on close.
        for call in list(self._streams):
            call.cancel()
        await self._channel.close()
