"""Translation of handler failures to gRPC statuses."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from runner_server.errors import (
    GenerationFailed,
    InvalidField,
    RunnerFault,
    reason_name,
    to_status,
)
from runner_server.telemetry.call_record import current_call
from runner_server.telemetry.methods import METHODS
from runner_server.transport.unknown_fields import WHOLE, Violations, read_known

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    # Handlers of every message type pass through here, so their types are open.
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Behaviour = Callable[[Any, _Context], Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Translates every exception of a handler to a status of the error table.

    gRPC itself would send the text of an unexpected exception to the client, as UNKNOWN.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap handlers of this server's services, which are unary or server-streaming."""
        handler = await continuation(handler_call_details)
        # Health and reflection are excluded: health's Watch is not an async generator.
        if handler is None or handler_call_details.method not in METHODS:
            return handler
        if handler.response_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, _guard_stream(handler)
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, _guard_unary(handler)
        return make(behaviour, _reader(handler.request_deserializer), handler.response_serializer)


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
        raise InvalidField(request.violations)


def _guard_unary(handler: _Handler) -> _Behaviour:
    inner: Any = handler.unary_unary

    async def call(request: object, context: _Context) -> object:
        try:
            _require_readable(request)
            return await inner(request, context)
        except (grpc.RpcError, grpc.aio.AbortError):
            raise
        except Exception as error:  # noqa: BLE001 - the last line before the wire
            await _abort(context, error)

    return call


def _guard_stream(handler: _Handler) -> _Behaviour:
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
            await _abort(context, error)

    return call


async def _abort(context: _Context, error: Exception) -> NoReturn:
    if not isinstance(error, RunnerFault):
        logger.error("unexpected error in a handler", exc_info=error)
        error = GenerationFailed("an unexpected error; the runner's log has the traceback")
    await abort(context, error)


async def abort(context: _Context, fault: RunnerFault) -> NoReturn:
    """End a call with a fault, keeping the trailing metadata already set."""
    current_call().reason = reason_name(fault)
    status: Any = rpc_status.to_status(to_status(fault))
    # Unlike abort_with_status, which would replace the trailing metadata.
    trailers = (*context.trailing_metadata(), *status.trailing_metadata)
    await context.abort(status.code, status.details, trailers)
    raise AssertionError("abort returned")
