"""Calls to runners that pass requests, responses and errors on as they are."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from runner_client.errors import RunnerExitedError, RunnerUnavailableError
from runner_client.rpc.transport.access import Access
from runner_client.rpc.transport.channel import open_aio_channel
from runner_common.contract import SERVICE_NAME

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from runner_client.pool.aio_member import Member
    from runner_common.serving.statuses import CallContext

    Context = CallContext
    _Metadata = tuple[tuple[str, str | bytes], ...]

_PASSED_HEADERS = frozenset({"traceparent", "tracestate", "baggage"})
"""Headers of callers that concern the runner. The token is the pool's."""

_DETAILS_KEY = "grpc-status-details-bin"
_LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""Codes of gRPC itself when the connection to a runner is lost."""


class Forwarder:
    """Passes calls on to the runners of a pool. Belongs to one event loop."""

    def __init__(self) -> None:
        # A runner's channel is closed with the last reference to its member.
        self._runners: weakref.WeakKeyDictionary[Member, _Runner] = weakref.WeakKeyDictionary()

    async def unary(
        self,
        member: Member,
        method: str,
        request: bytes,
        context: Context,
        on_call: Callable[[Callable[[], object]], object] = lambda _cancel: None,
    ) -> bytes:
        """Call a method that has one response, and return its bytes.

        Args:
            member: The runner.
            method: Name of the method.
            request: The request's bytes.
            context: The call of the pool, whose deadline applies, and which ends with the runner's
                error.
            on_call: Called with a function that cancels the call to the runner.

        Raises:
            RunnerUnavailableError: The runner is gone.
        """
        try:
            return await self.call(member, method, request, context, on_call)
        except grpc.aio.AioRpcError as error:
            await _pass_on(error, member, context)

    async def call(
        self,
        member: Member,
        method: str,
        request: bytes,
        context: Context,
        on_call: Callable[[Callable[[], object]], object] = lambda _cancel: None,
    ) -> bytes:
        """Like ``unary``, but leave the call of the pool as it is.

        Raises:
            grpc.aio.AioRpcError: The runner's error.
        """
        runner = self._runner(member)
        call = runner.unary(method)(
            request, timeout=context.time_remaining(), metadata=runner.headers(context)
        )
        on_call(call.cancel)
        return await call

    async def stream(
        self,
        member: Member,
        method: str,
        request: bytes,
        context: Context,
        on_call: Callable[[Callable[[], object]], object] = lambda _cancel: None,
    ) -> AsyncGenerator[bytes]:
        """Call a method that streams responses, and yield the bytes of each.

        Reads a response only after the one before was taken. The arguments and errors are those of
        ``unary``.

        Args:
            member: The runner.
            method: Name of the method.
            request: The request's bytes.
            context: The call of the pool.
            on_call: Called with a function that cancels the call to the runner.
        """
        runner = self._runner(member)
        call = runner.stream(method)(
            request, timeout=context.time_remaining(), metadata=runner.headers(context)
        )
        on_call(call.cancel)
        try:
            await call.initial_metadata()
            if not call.done():
                # The runner has accepted the request.
                await context.send_initial_metadata(())
            while isinstance(message := await call.read(), bytes):
                yield message
        except grpc.aio.AioRpcError as error:
            await _pass_on(error, member, context)
        finally:
            call.cancel()

    def _runner(self, member: Member) -> _Runner:
        runner = self._runners.get(member)
        if runner is None:
            runner = self._runners[member] = _Runner(member)
        return runner


class _Runner:
    """A runner's channel, on which messages are bytes."""

    def __init__(self, member: Member) -> None:
        process = member.process
        self._channel = open_aio_channel(process.address or "", None)
        self._metadata: _Metadata = Access.of(process.token, None).metadata or ()
        self._unary: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        self._stream: dict[str, grpc.aio.UnaryStreamMultiCallable[bytes, bytes]] = {}

    def unary(self, method: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        if method not in self._unary:
            self._unary[method] = self._channel.unary_unary(_path(method))
        return self._unary[method]

    def stream(self, method: str) -> grpc.aio.UnaryStreamMultiCallable[bytes, bytes]:
        if method not in self._stream:
            self._stream[method] = self._channel.unary_stream(_path(method))
        return self._stream[method]

    def headers(self, context: Context) -> _Metadata:
        """Return the headers of a call: the runner's token, and the trace of the caller."""
        sent: Any = context.invocation_metadata() or ()
        passed = [(key, value) for key, value in sent if key in _PASSED_HEADERS]
        return (*self._metadata, *passed)


def _path(method: str) -> str:
    return f"/{SERVICE_NAME}/{method}"


async def _pass_on(error: grpc.aio.AioRpcError, member: Member, context: Context) -> NoReturn:
    """End a call with the error of the runner, or say that the runner is gone."""
    trailers: Any = error.trailing_metadata() or ()
    pairs = tuple((key, value) for key, value in trailers)
    if error.code() in _LOST and _DETAILS_KEY not in dict(pairs):
        raise await asyncio.to_thread(_gone, member) from error
    await context.abort(error.code(), error.details() or "", pairs)
    raise AssertionError("abort returned")


def _gone(member: Member) -> RunnerUnavailableError:
    """Return the error of a lost runner, without the lines of its log."""
    gone = RunnerUnavailableError("the model's runner is gone; retry, which loads the model again")
    peer = member.process.peer
    explained = peer.explain(gone) if peer is not None else gone
    # A runner that is being reaped does not explain itself.
    error = explained if isinstance(explained, RunnerExitedError) else member.process.exit_error
    if error is None:
        return gone
    return RunnerUnavailableError(
        f"the model's runner is gone: {error.exit_reason}; the pool's log has its last lines. "
        "Retry, which loads the model again"
    )
