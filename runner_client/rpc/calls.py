"""Connection and calls of the sync client: everything that waits, expires or is cancelled.

``aio_calls`` has the same names for the asyncio client, the source of the sync client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from mlxrunner.v1 import runner_pb2_grpc
from runner_client.rpc.stream import ChatStream, CompletionStream, StatusStream
from runner_client.rpc.transport import health
from runner_client.rpc.transport.base import LOAD_SECONDS, POLL_SECONDS, ConnectionBase
from runner_client.rpc.transport.channel import open_channel
from runner_client.rpc.transport.trace import with_trace
from runner_client.rpc.transport.waits import WatchTimer
from runner_client.rpc.transport.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlxrunner.v1 import runner_pb2 as pb
    from runner_client.errors import RunnerError
    from runner_client.rpc.transport.base import Peer
    from runner_client.types import Timeouts, TlsFiles

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class LoadCall:
    """Pending ``Load`` rpc."""

    def __init__(
        self,
        reply: grpc.Future[pb.LoadResponse],
        failure: Callable[[BaseException], RunnerError],
    ) -> None:
        self._reply = reply
        self._failure = failure

    def poll(self) -> pb.LoadResponse | None:
        """Wait up to ``POLL_SECONDS`` for the reply; return None if the load is still running."""
        try:
            return self._reply.result(timeout=POLL_SECONDS)
        except grpc.FutureTimeoutError:
            return None
        except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
            raise self._failure(error) from error

    def cancel(self) -> None:
        """Cancel the load unless already finished."""
        self._reply.cancel()


class Connection(ConnectionBase):
    """Connection of the sync client: a channel, and the calls on the channel. Thread-safe."""

    def __init__(
        self,
        address: str,
        timeouts: Timeouts | None,
        token: str | None,
        tls: TlsFiles | None,
        peer: Peer | None,
    ) -> None:
        super().__init__(address, timeouts, token, tls, peer)
        self._channel = open_channel(address, self.access.credentials)
        self.stub = runner_pb2_grpc.RunnerServiceStub(self._channel)
        self.health = self._channel.unary_unary(
            health.METHOD, StringValue.SerializeToString, Int32Value.FromString
        )
        self._watchdog = Watchdog()

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
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
            return method(request, timeout=timeout, metadata=with_trace(self.access.metadata))
        except (grpc.RpcError, ValueError) as error:
            raise self._failure(error, timeout) from error

    def _failure(self, error: BaseException, timeout_seconds: float | None = None) -> RunnerError:
        failure = self.translated(error, timeout_seconds)
        return failure if self.peer is None else self.peer.explain(failure)

    def start_load(self, request: pb.LoadRequest) -> LoadCall:
        """Start a load without waiting for the response.

        Raises:
            RunnerUnavailableError: The client is closed.
        """
        try:
            reply = self.stub.Load.future(
                request, timeout=LOAD_SECONDS, metadata=with_trace(self.access.metadata)
            )
        except ValueError as error:
            raise self._failure(error) from error
        return LoadCall(reply, self._failure)

    def start_stream(self, request: pb.CompletionRequest) -> CompletionStream:
        """Start a completion.

        Raises:
            RunnerUnavailableError: The client is closed.
        """
        try:
            call = self.stub.Completion(request, metadata=with_trace(self.access.metadata))
        except ValueError as error:
            raise self._failure(error) from error
        return CompletionStream(
            call, timeouts=self.timeouts, watchdog=self._watchdog, failure=self._failure
        )

    def start_chat(self, request: pb.ChatRequest) -> ChatStream:
        """Start an answer, like a completion."""
        try:
            call = self.stub.Chat(request, metadata=with_trace(self.access.metadata))
        except ValueError as error:
            raise self._failure(error) from error
        return ChatStream(
            call, timeouts=self.timeouts, watchdog=self._watchdog, failure=self._failure
        )

    def start_watch(
        self, request: pb.WatchStatusRequest, interval_seconds: float | None
    ) -> StatusStream:
        """Start to watch the status.

        Raises:
            RunnerUnavailableError: The client is closed.
        """
        try:
            call = self.stub.WatchStatus(request, metadata=with_trace(self.access.metadata))
        except ValueError as error:
            raise self._failure(error) from error
        return StatusStream(
            call,
            timer=WatchTimer(self.timeouts, interval_seconds),
            watchdog=self._watchdog,
            failure=self._failure,
            note=self.note_status,
        )

    def close(self) -> None:
        """Close the channel, which ends all calls."""
        self.is_closed = True
        self._channel.close()
