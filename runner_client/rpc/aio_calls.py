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
from runner_client.errors import RunnerUnavailableError
from runner_client.rpc.aio_stream import (
    AsyncChatStream,
    AsyncCompletionStream,
    AsyncStatusStream,
    raise_if_cancelled,
)
from runner_client.rpc.transport import health
from runner_client.rpc.transport.base import LOAD_SECONDS, POLL_SECONDS, ConnectionBase
from runner_client.rpc.transport.channel import open_aio_channel
from runner_client.rpc.transport.trace import with_trace
from runner_client.rpc.transport.waits import WatchTimer

if TYPE_CHECKING:
    from mlxrunner.v1 import runner_pb2 as pb
    from mlxrunner.v1.runner_pb2_grpc import RunnerServiceAsyncStub
    from runner_client.errors import RunnerError
    from runner_client.rpc.transport.base import Peer
    from runner_client.types import Timeouts, TlsFiles

    CompletionCall = grpc.aio.UnaryStreamCall[pb.CompletionRequest, pb.CompletionResponse]
    ChatCall = grpc.aio.UnaryStreamCall[pb.ChatRequest, pb.ChatResponse]
    WatchCall = grpc.aio.UnaryStreamCall[pb.WatchStatusRequest, pb.WatchStatusResponse]

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class LoadCall:
    """Pending ``Load`` rpc."""

    def __init__(self, reply: asyncio.Task[pb.LoadResponse]) -> None:
        self._reply = reply

    async def poll(self) -> pb.LoadResponse | None:
        """Wait up to ``POLL_SECONDS`` for the reply; return None if the load is still running."""
        done, _ = await asyncio.wait((self._reply,), timeout=POLL_SECONDS)
        return self._reply.result() if done else None

    async def cancel(self) -> None:
        """Cancel the load unless already finished."""
        self._reply.cancel()
        # Wait for the call to end, and retrieve its exception so that asyncio does not log it.
        await asyncio.gather(self._reply, return_exceptions=True)


class Connection(ConnectionBase):
    """Connection of the asyncio client: a channel, and the calls on the channel."""

    def __init__(
        self,
        address: str,
        timeouts: Timeouts | None,
        token: str | None,
        tls: TlsFiles | None,
        peer: Peer | None,
    ) -> None:
        super().__init__(address, timeouts, token, tls, peer)
        self._streams: weakref.WeakSet[CompletionCall | ChatCall | WatchCall] = weakref.WeakSet()

    # The channel, stub and health method are created by the first call, because a channel binds
    # to the running event loop.

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return open_aio_channel(self.address, self.access.credentials)

    @cached_property
    def stub(self) -> RunnerServiceAsyncStub:
        """The gRPC stub of the runner service."""
        return runner_pb2_grpc.RunnerServiceStub(self._channel)

    @cached_property
    def health(self) -> grpc.aio.UnaryUnaryMultiCallable[StringValue, Int32Value]:
        """The ``Check`` method of the health service."""
        return self._channel.unary_unary(
            health.METHOD, StringValue.SerializeToString, Int32Value.FromString
        )

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_seconds: float | None = None,
    ) -> _Response:
        """Call a method and wait for the response.

        Args:
            method: A method of the stub, or the health method.
            request: The request message.
            timeout_seconds: The deadline. Default: ``Timeouts.call_seconds``.

        Raises:
            RunnerError: The call failed.
        """
        timeout = timeout_seconds or self.timeouts.call_seconds
        try:
            return await method(request, timeout=timeout, metadata=with_trace(self.access.metadata))
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            raise await self._failure(error, timeout) from error

    async def _failure(
        self, error: BaseException, timeout_seconds: float | None = None
    ) -> RunnerError:
        failure = self.translated(error, timeout_seconds)
        if self.peer is None or not isinstance(failure, RunnerUnavailableError):
            return failure
        # The peer may block until the process's exit is known.
        return await asyncio.to_thread(self.peer.explain, failure)

    def start_load(self, request: pb.LoadRequest) -> LoadCall:
        """Start a load without waiting for the response."""
        return LoadCall(asyncio.create_task(self.call(self.stub.Load, request, LOAD_SECONDS)))

    def start_stream(self, request: pb.CompletionRequest) -> AsyncCompletionStream:
        """Start a completion.

        Raises:
            RunnerUnavailableError: The client is closed.
        """
        try:
            call = self.stub.Completion(request, metadata=with_trace(self.access.metadata))
        except grpc.aio.UsageError as error:
            raise self.translated(error) from error
        self._streams.add(call)
        return AsyncCompletionStream(call, timeouts=self.timeouts, failure=self._failure)

    def start_chat(self, request: pb.ChatRequest) -> AsyncChatStream:
        """Start an answer, like a completion."""
        try:
            call = self.stub.Chat(request, metadata=with_trace(self.access.metadata))
        except grpc.aio.UsageError as error:
            raise self.translated(error) from error
        self._streams.add(call)
        return AsyncChatStream(call, timeouts=self.timeouts, failure=self._failure)

    def start_watch(
        self, request: pb.WatchStatusRequest, interval_seconds: float | None
    ) -> AsyncStatusStream:
        """Start to watch the status.

        Raises:
            RunnerUnavailableError: The client is closed.
        """
        try:
            call = self.stub.WatchStatus(request, metadata=with_trace(self.access.metadata))
        except grpc.aio.UsageError as error:
            raise self.translated(error) from error
        self._streams.add(call)
        timer = WatchTimer(self.timeouts, interval_seconds)
        return AsyncStatusStream(call, timer=timer, failure=self._failure, note=self.note_status)

    async def close(self) -> None:
        """Close the channel, which ends all calls."""
        self.is_closed = True
        # Older grpcio (1.80, for one) does not end a stream that is being read on close.
        for call in list(self._streams):
            call.cancel()
        await self._channel.close()
