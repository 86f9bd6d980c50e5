"""The stream of a completion, as an async iterator."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING, Self

import grpc

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.rpc.base import END_SECONDS, cancelled_stream, incomplete_stream
from runner_client.rpc.messages import completion_chunk
from runner_client.rpc.waits import StreamTimer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from runner_client.errors import RunnerError
    from runner_client.types import CompletionChunk, Timeouts


class AsyncCompletionStream:
    """The chunks of one completion: an async iterator and a context manager.

    The call is under way as soon as the stream exists. Leaving the ``async with``
    block, ``cancel()``, cancelling the task that reads, or dropping the stream
    cancels it on the server, unless the last chunk (``done``) was read. A stream
    that ends without it raises ``IncompleteStreamError``; every failure is a
    ``RunnerError``.

    It belongs to the event loop of its client; one task reads.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[pb.CompletionRequest, pb.CompletionResponse],
        *,
        timeouts: Timeouts,
        failure: Callable[[BaseException], Awaitable[RunnerError]],
    ) -> None:
        self._call = call
        self._timer = StreamTimer(timeouts)
        self._failure = failure
        self._is_done = False
        self._is_cancelled = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> CompletionChunk:
        """Waits for the next chunk.

        Raises:
            RunnerError: The completion failed; the class says how.
            StopAsyncIteration: The chunk before was the last.
        """
        if self._is_done:
            await self._read_end()
            raise StopAsyncIteration
        chunk = completion_chunk(await self._read())
        self._timer.received(chunk)
        self._is_done = chunk.done
        return chunk

    async def _read(self) -> pb.CompletionResponse:
        loop = asyncio.get_running_loop()
        deadline = self._timer.deadline(loop.time())
        try:
            async with asyncio.timeout_at(None if deadline == math.inf else deadline):
                message = await self._call.read()
        except TimeoutError:
            # The timeout has cancelled the read, and with it the call.
            raise self._timer.expired(loop.time()) from None
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            raise await self._error(error) from error
        if not isinstance(message, pb.CompletionResponse):  # grpc.aio.EOF
            raise incomplete_stream()
        return message

    async def _read_end(self) -> None:
        """Lets the call end well: dropped before, it would look cancelled to the server."""
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._call.read()
        except (TimeoutError, grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            # The text is whole, whatever comes now.
            raise_if_cancelled(error)

    async def _error(self, error: BaseException) -> RunnerError:
        return cancelled_stream() if self._is_cancelled else await self._failure(error)

    def cancel(self) -> None:
        """Cancels the completion, if it still runs. Returns at once."""
        if not self._is_done:
            self._is_cancelled = True
            self._call.cancel()

    def __del__(self) -> None:
        # gRPC's own call is kept alive by its channel until it ends. A loop that
        # is closed has no calls left.
        with contextlib.suppress(RuntimeError):
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


def raise_if_cancelled(error: BaseException) -> None:
    """Raises a ``CancelledError`` again that is meant for the task that runs.

    gRPC raises one as well when the call was cut off under the task: the channel
    was closed, or the stream cancelled by another task.
    """
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
