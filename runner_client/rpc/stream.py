"""Streams of a completion and of statuses as sync iterators."""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import grpc

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
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Protocol

    from runner_client.errors import RunnerError
    from runner_client.rpc.transport.watchdog import Watchdog
    from runner_client.types import Status, Timeouts

    _MessageT_co = TypeVar("_MessageT_co", covariant=True)

    class _Call(Protocol[_MessageT_co]):
        """The part of gRPC's call object used by a stream."""

        def __iter__(self) -> Iterator[_MessageT_co]: ...
        def __next__(self) -> _MessageT_co: ...
        def cancel(self) -> bool: ...


_MessageT = TypeVar("_MessageT")
_ChunkT = TypeVar("_ChunkT", bound=CompletionChunk)


class _ChunkStream(Generic[_MessageT, _ChunkT]):
    """Chunks of one generation."""

    def __init__(
        self,
        call: _Call[_MessageT],
        *,
        timeouts: Timeouts,
        watchdog: Watchdog,
        failure: Callable[[Exception], RunnerError],
    ) -> None:
        self._call = call
        self._timer = StreamTimer(timeouts)
        self._watchdog = watchdog
        self._failure = failure
        self._has_text = False
        self._is_done = False
        self._is_cancelled = False
        self._is_expired = False

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def _convert(self, message: _MessageT) -> _ChunkT:
        """Return the chunk of a message."""

    def __next__(self) -> _ChunkT:
        """Return the next chunk.

        Raises:
            RunnerError: The completion failed; the class gives the reason.
            StopIteration: The previous chunk was the last.
        """
        if self._is_done:
            self._read_end()
            raise StopIteration
        chunk = self._convert(self._read())
        self._timer.received(chunk)
        self._has_text = self._has_text or bool(chunk.content)
        self._is_done = chunk.done
        return chunk

    def _read(self) -> _MessageT:
        self._watchdog.arm(id(self), self._timer.deadline(time.monotonic()), self._expire)
        try:
            return next(self._call)
        except StopIteration:
            raise incomplete_stream() from None
        except (grpc.RpcError, ValueError) as error:
            raise self._error(error) from error
        finally:
            self._watchdog.disarm(id(self))

    def _read_end(self) -> None:
        """Wait for the call to end, because dropping the call early would cancel it."""
        self._watchdog.arm(id(self), time.monotonic() + END_SECONDS, self._expire)
        # The text is complete, so later errors do not matter.
        with contextlib.suppress(grpc.RpcError, ValueError):
            next(self._call, None)
        self._watchdog.disarm(id(self))

    def _error(self, error: Exception) -> RunnerError:
        if self._is_expired:
            return self._timer.expired(time.monotonic())
        if self._is_cancelled:
            return cancelled_stream()
        failure = self._failure(error)
        return cut_off(failure) if self._has_text else failure

    def _expire(self) -> None:
        self._is_expired = True
        self._call.cancel()

    def cancel(self) -> None:
        """Cancel the completion unless already finished. Returns at once."""
        if not self._is_done:
            self._is_cancelled = True
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class CompletionStream(_ChunkStream[pb.CompletionResponse, CompletionChunk]):
    """Chunks of one completion: an iterator and a context manager.

    The request is sent when the stream is created. Leaving the ``with`` block, calling
    ``cancel()`` or dropping the stream cancels the completion on the server, unless the last
    chunk (``done``) was read. A stream that ends before its last chunk raises
    ``IncompleteStreamError``; every failure is a ``RunnerError``.

    Only one thread may read; ``cancel()`` may be called from any thread.
    """

    def _convert(self, message: pb.CompletionResponse) -> CompletionChunk:
        return completion_chunk(message)


class ChatStream(_ChunkStream[pb.ChatResponse, ChatChunk]):
    """Chunks of one answer, with the rules of a ``CompletionStream``."""

    def _convert(self, message: pb.ChatResponse) -> ChatChunk:
        return chat_chunk(message)


class StatusStream:
    """Statuses of a watched runner: an iterator and a context manager.

    The request is sent when the stream is created. Leaving the ``with`` block, calling
    ``cancel()`` or dropping the stream ends the watch; a cancelled stream has no more statuses.
    Every other end is a ``RunnerError``: ``ShuttingDownError`` after a status that says so.

    Only one thread may read; ``cancel()`` may be called from any thread.
    """

    def __init__(
        self,
        call: _Call[pb.WatchStatusResponse],
        *,
        timer: WatchTimer,
        watchdog: Watchdog,
        failure: Callable[[Exception], RunnerError],
        note: Callable[[Status], None],
    ) -> None:
        self._call = call
        self._timer = timer
        self._watchdog = watchdog
        self._failure = failure
        self._note = note
        self._is_cancelled = False
        self._is_expired = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Status:
        """Wait for the next status.

        Raises:
            ShuttingDownError: The runner is stopping; the previous status says so.
            RunnerTimeoutError: No status arrived in time.
            RunnerError: The watch failed for another reason.
            StopIteration: The stream was cancelled.
        """
        self._watchdog.arm(id(self), self._timer.deadline(time.monotonic()), self._expire)
        try:
            message = next(self._call)
        except (grpc.RpcError, ValueError) as error:
            if self._is_expired:
                raise self._timer.expired() from error
            if self._is_cancelled:
                raise StopIteration from None
            raise self._failure(error) from error
        finally:
            self._watchdog.disarm(id(self))
        self._timer.received()
        current = status(message.status)
        self._note(current)
        return current

    def _expire(self) -> None:
        self._is_expired = True
        self._call.cancel()

    def cancel(self) -> None:
        """End the watch. Returns at once."""
        self._is_cancelled = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()
