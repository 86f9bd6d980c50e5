"""Translation of handler failures to gRPC statuses."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from runner_common.serving.statuses import abort
from runner_common.serving.unknown_fields import WHOLE, Violations, read_known

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Container

    from google.rpc import status_pb2

    # Handlers of every message type pass through here, so their types are open.
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Behaviour = Callable[[Any, _Context], Any]


class UnreadableRequestError(Exception):
    """A request has unknown fields or unreadable bytes.

    Args:
        violations: Pairs of a field's path and a description of its problem; at least one.
    """

    def __init__(self, violations: Violations) -> None:
        super().__init__(violations)
        self.violations = violations


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Translates every exception of a handler to a status of the error table.

    gRPC itself would send the text of an unexpected exception to the client, as UNKNOWN.

    Args:
        methods: Paths of the methods to wrap. Health and reflection set their status codes
            themselves.
        translate: Returns the status for an exception of a handler, or for an
            ``UnreadableRequestError``.
    """

    def __init__(
        self, methods: Container[str], translate: Callable[[Exception], status_pb2.Status]
    ) -> None:
        self._methods = methods
        self._translate = translate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap handlers of this server's services, which are unary or server-streaming."""
        handler = await continuation(handler_call_details)
        # Health and reflection are excluded: health's Watch is not an async generator.
        if handler is None or handler_call_details.method not in self._methods:
            return handler
        if handler.response_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, self._guard_stream(handler)
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, self._guard_unary(handler)
        return make(behaviour, _reader(handler.request_deserializer), handler.response_serializer)

    def _guard_unary(self, handler: _Handler) -> _Behaviour:
        inner: Any = handler.unary_unary

        async def call(request: object, context: _Context) -> object:
            try:
                _require_readable(request)
                return await inner(request, context)
            except (grpc.RpcError, grpc.aio.AbortError):
                raise
            except Exception as error:  # noqa: BLE001 - the last line before the wire
                await abort(context, self._translate(error))

        return call

    def _guard_stream(self, handler: _Handler) -> _Behaviour:
        inner: Any = handler.unary_stream

        async def call(request: object, context: _Context) -> AsyncIterator[object]:
            try:
                _require_readable(request)
                # aclosing: a cancelled call must run the handler's `finally` now, not at the next
                # garbage collection.
                async with aclosing(inner(request, context)) as replies:
                    async for reply in replies:
                        yield reply
            except (grpc.RpcError, grpc.aio.AbortError):
                raise
            except Exception as error:  # noqa: BLE001 - the last line before the wire
                await abort(context, self._translate(error))

        return call


@dataclass(frozen=True)
class _Unreadable:
    """Placeholder for a request with unknown fields or unreadable bytes."""

    violations: Violations


def _reader(read: Callable[[bytes], Any] | None) -> Callable[[bytes], object]:
    """Return a deserializer returning an :class:`_Unreadable` instead of raising.

    gRPC would send the text of the exception to the client, as UNKNOWN.
    """

    def read_safely(data: bytes) -> object:
        if read is None:
            return data
        try:
            request, unknown = read_known(read, data)
        except DecodeError:
            text = "not a message of this rpc: its bytes are damaged, or a string is not UTF-8"
            return _Unreadable([(WHOLE, text)])
        return _Unreadable(unknown) if unknown else request

    return read_safely


def _require_readable(request: object) -> None:
    if isinstance(request, _Unreadable):
        raise UnreadableRequestError(request.violations)
