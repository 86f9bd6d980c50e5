"""Connection and calls of the sync client: everything that waits, expires or is cancelled.

``aio_calls`` has the same names for the asyncio client, the source of the sync client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from mlxrunner.v1 import runner_pb2_grpc
from runner_client.rpc import health
from runner_client.rpc.base import LOAD_SECONDS, POLL_SECONDS, ClientBase
from runner_client.rpc.channel import open_channel
from runner_client.rpc.stream import CompletionStream
from runner_client.rpc.trace import with_trace
from runner_client.rpc.watchdog import Watchdog

if TYPE_CHECKING:
    from mlxrunner.v1 import runner_pb2 as pb
    from runner_client.errors import RunnerError
    from runner_client.types import Timeouts, TlsFiles

    LoadCall = grpc.Future[pb.LoadResponse]

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class ClientCalls(ClientBase):
    """Base of the sync client: a channel and the ways to call it. Thread-safe."""

    def __init__(
        self,
        address: str,
        timeouts: Timeouts | None,
        token: str | None,
        tls: TlsFiles | None,
    ) -> None:
        super().__init__(address, timeouts, token, tls)
        self._channel = open_channel(address, self._access.credentials)
        self._stub = runner_pb2_grpc.RunnerServiceStub(self._channel)
        self._health = self._channel.unary_unary(
            health.METHOD, StringValue.SerializeToString, Int32Value.FromString
        )
        self._watchdog = Watchdog()

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_seconds: float | None = None,
    ) -> _Response:
        timeout = timeout_seconds or self.timeouts.call_seconds
        try:
            return method(request, timeout=timeout, metadata=with_trace(self._access.metadata))
        except (grpc.RpcError, ValueError) as error:
            raise self._failure(error, timeout) from error

    def _failure(self, error: BaseException, timeout_seconds: float | None = None) -> RunnerError:
        return self._translated(error, timeout_seconds)

    def _start_load(self, request: pb.LoadRequest) -> LoadCall:
        try:
            return self._stub.Load.future(
                request, timeout=LOAD_SECONDS, metadata=with_trace(self._access.metadata)
            )
        except ValueError as error:
            raise self._failure(error) from error

    def _poll_load(self, call: LoadCall) -> pb.LoadResponse | None:
        """Wait up to ``POLL_SECONDS`` for the reply; return None if the load is still running."""
        try:
            return call.result(timeout=POLL_SECONDS)
        except grpc.FutureTimeoutError:
            return None
        except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
            raise self._failure(error) from error

    def _end_load(self, call: LoadCall) -> None:
        """Cancel a load unless already finished."""
        call.cancel()

    def _start_stream(self, request: pb.CompletionRequest) -> CompletionStream:
        try:
            call = self._stub.Completion(request, metadata=with_trace(self._access.metadata))
        except ValueError as error:
            raise self._failure(error) from error
        return CompletionStream(
            call, timeouts=self.timeouts, watchdog=self._watchdog, failure=self._failure
        )

    def _disconnect(self) -> None:
        self._is_closed = True
        self._channel.close()
