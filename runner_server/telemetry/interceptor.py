"""Interceptor that reports the start and end of each RPC to the observers exactly once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from runner_server.telemetry.call_record import ID_HEADER, CallRecord, CallSummary, enter
from runner_server.telemetry.methods import METHODS

if TYPE_CHECKING:
    # Handlers of every message type pass through here, so their types are open.
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Behaviour = Callable[[Any, _Context], Any]

_CLOCK_SLACK_SECONDS = 0.1
"""Time before its deadline from which a cancelled call counts as one that exceeded it."""


class Observer(Protocol):
    """Receiver of call events, on the event loop; must not block."""

    def observe(self, call: CallRecord) -> Callable[[CallSummary], None]:
        """Handle the start of a call, and return a handler for the end.

        The returned handler is called exactly once. All observers get the same summary, which is
        frozen, so their order does not matter.
        """
        ...


class TelemetryInterceptor(grpc.aio.ServerInterceptor):
    """Notifies observers of every call to the methods in ``METHODS``.

    Must be the first interceptor, to see calls that others refuse.

    Args:
        observers: The observers of calls. The sequence may grow at any time.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Start the record of a call; the end of the call's task ends the record."""
        # Known methods only, because callers could invent any number of names for metric labels.
        method = METHODS.get(handler_call_details.method)
        task = asyncio.current_task()
        if method is None or task is None:
            return await continuation(handler_call_details)
        headers = handler_call_details.invocation_metadata or ()
        record = CallRecord.arrived(method, headers)
        enter(record)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        call = _Call(record)
        handlers = [observer.observe(record) for observer in self._observers]
        # Not a callback of the context, because a caller may disconnect before it exists.
        task.add_done_callback(lambda _task: _end(call, handlers))
        return call.watch(handler)


def _end(call: _Call, handlers: Sequence[Callable[[CallSummary], None]]) -> None:
    summary = call.record.end(call.code())
    for handle in handlers:
        handle(summary)


class _Call:
    """A running call, whose handler is wrapped to observe the outcome."""

    def __init__(self, record: CallRecord) -> None:
        self.record = record
        self._context: _Context | None = None
        self._is_answered = False

    def watch(self, handler: _Handler) -> _Handler:
        """Return the handler, wrapped to observe the outcome."""
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        inner = getattr(handler, kind)
        outer = self._stream(inner) if inspect.isasyncgenfunction(inner) else self._plain(inner)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        watched: _Handler = make(outer, handler.request_deserializer, handler.response_serializer)
        return watched

    def code(self) -> str:
        """Return the name of the gRPC code the call ended with."""
        code = self._context.code() if self._context else None
        if isinstance(code, grpc.StatusCode):
            return code.name
        if self._is_answered:
            return grpc.StatusCode.OK.name
        # gRPC cancels the task both at the deadline and when the caller cancels.
        left = self._context.time_remaining() if self._context else None
        if left is not None and left < _CLOCK_SLACK_SECONDS:
            return grpc.StatusCode.DEADLINE_EXCEEDED.name
        return grpc.StatusCode.CANCELLED.name

    def _plain(self, inner: _Behaviour) -> _Behaviour:
        async def call(message: object, context: _Context) -> object:
            self._open(context)
            reply = await inner(message, context)
            self._is_answered = True
            return reply

        return call

    def _stream(self, inner: _Behaviour) -> _Behaviour:
        async def call(message: object, context: _Context) -> AsyncIterator[object]:
            self._open(context)
            async with aclosing(inner(message, context)) as replies:
                async for reply in replies:
                    yield reply
            self._is_answered = True

        return call

    def _open(self, context: _Context) -> None:
        self._context = context
        context.set_trailing_metadata(((ID_HEADER, self.record.id),))
