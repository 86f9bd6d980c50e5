"""Streams of a completion and of statuses as async iterators."""

from __future__ import annotations

import asyncio
import contextlib
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.rpc.messages.chats import chat_chunk
from runner_client.rpc.messages.responses import completion_chunk, status
from runner_client.rpc.transport.base import (
    END_SECONDS,
    cancelled_stream,
    cut_off,
    incomplete_stream,
)
from runner_client.rpc.transport.waits import StreamTimer, WatchTimer
from runner_client.types import ChatChunk, CompletionChunk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from runner_client.errors import RunnerError
    from runner_client.types import Status, Timeouts

_RequestT = TypeVar("_RequestT", bound=Message)
_MessageT = TypeVar("_MessageT", bound=Message)
_ChunkT = TypeVar("_ChunkT", bound=CompletionChunk)


class _ChunkStream(Generic[_RequestT, _MessageT, _ChunkT]):
    """Chunks of one generation."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[_RequestT, _MessageT],
        *,
        timeouts: Timeouts,
        failure: Callable[[BaseException], Awaitable[RunnerError]],
    ) -> None:
        self._call = call
        self._timer = StreamTimer(timeouts)
        self._failure = failure
        self._has_text = False
        self._is_done = False
        self._is_cancelled = False

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    def _convert(self, message: _MessageT) -> _ChunkT:
        """Return the chunk of a message."""

    async def __anext__(self) -> _ChunkT:
        """Return the next chunk.

        Raises:
            RunnerError: The completion failed; the class gives the reason.
            StopAsyncIteration: The previous chunk was the last.
        """
        if self._is_done:
            await self._read_end()
            raise StopAsyncIteration
        chunk = self._convert(await self._read())
        self._timer.received(chunk)
        self._has_text = self._has_text or bool(chunk.content)
        self._is_done = chunk.done
        return chunk

    async def _read(self) -> _MessageT:
        loop = asyncio.get_running_loop()
        deadline = self._timer.deadline(loop.time())
        try:
            async with asyncio.timeout_at(None if deadline == math.inf else deadline):
                message = await self._call.read()
        except TimeoutError:
            # The timeout cancelled the read, and with it the call.
            raise self._timer.expired(loop.time()) from None
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            raise await self._error(error) from error
        if not isinstance(message, Message):  # grpc.aio.EOF
            raise incomplete_stream()
        return cast("_MessageT", message)

    async def _read_end(self) -> None:
        """Wait for the call to end, because dropping the call early would cancel it."""
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._call.read()
        except (TimeoutError, grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            # The text is complete, so later errors do not matter.
            raise_if_cancelled(error)

    async def _error(self, error: BaseException) -> RunnerError:
        if self._is_cancelled:
            return cancelled_stream()
        failure = await self._failure(error)
        return cut_off(failure) if self._has_text else failure

    def cancel(self) -> None:
        """Cancel the completion unless already finished. Returns at once."""
        if not self._is_done:
            self._is_cancelled = True
            self._call.cancel()

    def __del__(self) -> None:
        # The channel keeps gRPC's own call alive until it ends. A closed event loop has no calls
        # left.
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


class AsyncCompletionStream(
    _ChunkStream[pb.CompletionRequest, pb.CompletionResponse, CompletionChunk]
):
    """Chunks of one completion: an async iterator and a context manager.

    The request is sent when the stream is created. Leaving the ``async with`` block, calling
    ``cancel()`` or dropping the stream cancels the completion on the server, unless the last
    chunk (``done``) was read. A stream that ends before its last chunk raises
    ``IncompleteStreamError``; every failure is a ``RunnerError``.

    A stream belongs to the event loop of its client. Only one task may read, and cancelling
    that task cancels the completion.
    """

    def _convert(self, message: pb.CompletionResponse) -> CompletionChunk:
        return completion_chunk(message)


class AsyncChatStream(_ChunkStream[pb.ChatRequest, pb.ChatResponse, ChatChunk]):
    """Chunks of one answer, with the rules of an ``AsyncCompletionStream``."""

    def _convert(self, message: pb.ChatResponse) -> ChatChunk:
        return chat_chunk(message)


class AsyncStatusStream:
    """Statuses of a watched runner: an async iterator and a context manager.

    The request is sent when the stream is created. Leaving the ``async with`` block, calling
    ``cancel()`` or dropping the stream ends the watch; a cancelled stream has no more statuses.
    Every other end is a ``RunnerError``: ``ShuttingDownError`` after a status that says so.

    A stream belongs to the event loop of its client. Only one task may read, and cancelling
    that task ends the watch.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[pb.WatchStatusRequest, pb.WatchStatusResponse],
        *,
        timer: WatchTimer,
        failure: Callable[[BaseException], Awaitable[RunnerError]],
        note: Callable[[Status], None],
    ) -> None:
        self._call = call
        self._timer = timer
        self._failure = failure
        self._note = note
        self._is_cancelled = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Status:
        """Wait for the next status.

        Raises:
            ShuttingDownError: The runner is stopping; the previous status says so.
            RunnerTimeoutError: No status arrived in time.
            RunnerError: The watch failed for another reason.
            StopAsyncIteration: The stream was cancelled.
        """
        message = await self._read()
        if not isinstance(message, pb.WatchStatusResponse):
            raise StopAsyncIteration
        self._timer.received()
        current = status(message.status)
        self._note(current)
        return current

    async def _read(self) -> object:
        """Return the next message, or another object at the end of the stream."""
        deadline = self._timer.deadline(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout_at(None if deadline == math.inf else deadline):
                return await self._call.read()
        except TimeoutError:
            # The timeout cancelled the read, and with it the call.
            raise self._timer.expired() from None
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            if self._is_cancelled:
                return None
            raise await self._failure(error) from error

    def cancel(self) -> None:
        """End the watch. Returns at once."""
        self._is_cancelled = True
        self._call.cancel()

    def __del__(self) -> None:
        # The channel keeps gRPC's own call alive until it ends. A closed event loop has no calls
        # left.
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
    """Reraise a ``CancelledError`` meant for the current task.

    gRPC also raises ``CancelledError`` if the call was ended elsewhere: the channel was closed,
    or another task cancelled the stream.
    """
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
