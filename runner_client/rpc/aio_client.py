"""The asyncio client of any runner, local or remote."""

from __future__ import annotations

import asyncio
import time
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.errors import RunnerError
from runner_client.rpc import health, messages
from runner_client.rpc.aio_stream import AsyncCompletionStream, raise_if_cancelled
from runner_client.rpc.base import (
    LOAD_SECONDS,
    POLL_SECONDS,
    STATUS_SECONDS,
    ClientBase,
    embedding_error,
)
from runner_client.rpc.channel import open_aio_channel
from runner_client.rpc.trace import with_trace
from runner_client.rpc.waits import LoadWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from mlxrunner.v1.runner_pb2_grpc import RunnerServiceAsyncStub
    from runner_client.types import (
        Completion,
        Dtype,
        LoadEstimate,
        LoadResult,
        Options,
        Status,
        Timeouts,
        TlsFiles,
    )

    CompletionCall = grpc.aio.UnaryStreamCall[pb.CompletionRequest, pb.CompletionResponse]

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncRunnerClient(ClientBase):
    """Calls a runner at an address, in asyncio.

    It belongs to the event loop of its first call, and only tasks of that loop may
    use it, as many at the same time as they like. It does not survive a fork: gRPC
    does not. Make a client after the fork, or spawn instead.

    Nothing is dialled before the first call. Calls that only read are retried a
    little when the runner cannot be reached; no other call ever is. Cancelling a
    task cancels its call, and ``asyncio.CancelledError`` stays what it is.

    Args:
        address: ``HOST:PORT`` or ``unix:/path``.
        token: What the server asks of its callers, sent with every call. Without TLS
            it goes over the wire in clear.
        tls: Encrypts, and says whom to trust. Default: the connection is not encrypted.
        timeouts: How long to wait for what.

    Raises:
        ValueError: The address is empty, or the token cannot be sent.
        OSError: A file of ``tls`` cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: TlsFiles | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        super().__init__(address, timeouts, token, tls)
        self._streams: weakref.WeakSet[CompletionCall] = weakref.WeakSet()

    # A channel takes the event loop that runs when it is made, so all three are
    # made by the first call.

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return open_aio_channel(self.address, self._access.credentials)

    @cached_property
    def _stub(self) -> RunnerServiceAsyncStub:
        return runner_pb2_grpc.RunnerServiceStub(self._channel)

    @cached_property
    def _health(self) -> grpc.aio.UnaryUnaryMultiCallable[StringValue, Int32Value]:
        return self._channel.unary_unary(
            health.METHOD, StringValue.SerializeToString, Int32Value.FromString
        )

    async def load(
        self,
        model: str,
        *,
        context_length: int | None = None,
        parallel: int | None = None,
        dtype: Dtype = "auto",
        memory_limit_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        memory_override: bool = False,
        allow_inexact: bool = False,
        on_progress: Callable[[Status], None] | None = None,
    ) -> LoadResult:
        """Loads a model and returns when it can be used.

        Arguments, limits and errors are those of ``RunnerClient.load``. Cancelling
        the task cancels the load.

        Raises:
            RunnerError: The model was not loaded; the class says why.
        """
        request = messages.load_request(
            model,
            context_length=context_length,
            parallel=parallel,
            dtype=dtype,
            memory_limit_bytes=memory_limit_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            memory_override=memory_override,
            allow_inexact=allow_inexact,
        )
        reply = self._start_load(request)
        try:
            return await self._finish_load(reply, on_progress)
        finally:
            reply.cancel()
            # Waits until the call is gone, and takes note of its error.
            await asyncio.gather(reply, return_exceptions=True)

    def _start_load(self, request: pb.LoadRequest) -> asyncio.Task[pb.LoadResponse]:
        return asyncio.create_task(self._call(self._stub.Load, request, LOAD_SECONDS))

    async def _finish_load(
        self,
        reply: asyncio.Task[pb.LoadResponse],
        on_progress: Callable[[Status], None] | None,
    ) -> LoadResult:
        watch = LoadWatch(self.timeouts.load_seconds, time.monotonic())
        while not (await asyncio.wait((reply,), timeout=POLL_SECONDS))[0]:
            await self._watch_load(watch, on_progress)
        return messages.load_result(reply.result())

    async def _watch_load(
        self, watch: LoadWatch, on_progress: Callable[[Status], None] | None
    ) -> None:
        try:
            status = await self._status(STATUS_SECONDS)
        except RunnerError:
            # The load itself says what is wrong, unless nothing answers at all.
            status = None
        watch.observe(status, time.monotonic())
        if status is not None and on_progress is not None:
            on_progress(status)

    async def estimate(
        self,
        model: str,
        *,
        context_length: int | None = None,
        parallel: int | None = None,
        dtype: Dtype = "auto",
        memory_limit_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        allow_inexact: bool = False,
    ) -> LoadEstimate:
        """Ask what a load would need in memory, and whether it fits now.

        Nothing is loaded, and a loaded model keeps working. The first call for a model
        takes about half a second; ``Timeouts.call_seconds`` is its limit too.

        Arguments and errors are those of ``RunnerClient.estimate``.

        Raises:
            RunnerError: There is no estimate; the class says why.
        """
        request = messages.estimate_request(
            model,
            context_length=context_length,
            parallel=parallel,
            dtype=dtype,
            memory_limit_bytes=memory_limit_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            allow_inexact=allow_inexact,
        )
        return messages.load_estimate(await self._call(self._stub.Estimate, request))

    async def trim(self, *, prefix_cache_bytes: int | None = None) -> int:
        """Have the runner give memory back without ending anything; return the bytes.

        Entries of the prefix cache go first, then what MLX and the heap keep of freed
        memory. Running completions wait for it, a fraction of a second, and it waits for
        the step that they are in; ``Timeouts.call_seconds`` is its limit.

        Args:
            prefix_cache_bytes: The size that the prefix cache is reduced to at least; it
                may grow again afterwards. Default: 0.

        Raises:
            InvalidRequestError: The size is negative.
            BusyError: A load or an unload runs.
            RunnerError: The call failed in another way.
        """
        request = messages.trim_request(prefix_cache_bytes)
        return (await self._call(self._stub.Trim, request)).freed_bytes

    async def unload(self) -> int:
        """Ends all completions, frees the model, and returns how many bytes came back.

        Raises:
            BusyError: A load or another unload runs.
            RunnerError: The call failed in another way.
        """
        return (await self._call(self._stub.Unload, pb.UnloadRequest())).freed_bytes

    async def status(self) -> Status:
        """Asks what the runner does and holds. It answers during a load too.

        Raises:
            RunnerError: The call failed.
        """
        return await self._status(self.timeouts.call_seconds)

    async def _status(self, timeout_seconds: float) -> Status:
        reply = await self._call(self._stub.Status, pb.StatusRequest(), timeout_seconds)
        return messages.status(reply)

    async def ping(self) -> float:
        """Asks for a status and returns how long the answer took, in seconds.

        Raises:
            RunnerError: The call failed.
        """
        begin = time.monotonic()
        await self.status()
        return time.monotonic() - begin

    async def is_serving(self, service: str = "") -> bool:
        """Asks ``grpc.health.v1`` whether calls are answered (not: a model is loaded).

        Args:
            service: A full service name; "" is the server as a whole.

        Raises:
            RunnerError: The call failed, or the service is unknown.
        """
        return health.is_serving(await self._call(self._health, health.request(service)))

    def completion(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> AsyncCompletionStream:
        """Starts a completion and returns the stream of its chunks; nothing to await.

        Arguments and limits are those of ``RunnerClient.completion``.

        Raises:
            RunnerUnavailableError: The client is closed. All other failures come
                from reading the stream.
        """
        request = messages.completion_request(
            prompt, options=options, logprobs=logprobs, request_id=request_id
        )
        try:
            call = self._stub.Completion(request, metadata=with_trace(self._access.metadata))
        except grpc.aio.UsageError as error:
            raise self._translated(error) from error
        self._streams.add(call)
        return AsyncCompletionStream(call, timeouts=self.timeouts, failure=self._failure)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> Completion:
        """Waits for a whole completion.

        Arguments, limits and errors are those of ``RunnerClient.complete``.

        Raises:
            RunnerError: The completion failed; the class says how.
        """
        stream = self.completion(prompt, options=options, logprobs=logprobs, request_id=request_id)
        async with stream:
            return messages.join_chunks([chunk async for chunk in stream])

    async def tokenize(self, content: str, *, add_special_tokens: bool = False) -> list[int]:
        """Splits text into the model's token ids.

        Args:
            content: The text.
            add_special_tokens: Whether to add what a completion's prompt gets.

        Raises:
            ModelNotLoadedError: No model is loaded.
            RunnerError: The call failed in another way.
        """
        request = messages.tokenize_request(content, add_special_tokens=add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Joins token ids into text: the inverse of ``tokenize``.

        Raises:
            InvalidRequestError: An id is not in the vocabulary.
            ModelNotLoadedError: No model is loaded.
            RunnerError: The call failed in another way.
        """
        request = messages.detokenize_request(token_ids)
        return (await self._call(self._stub.Detokenize, request)).content

    async def embedding(self, content: str) -> NoReturn:  # noqa: ARG002 - the interface has it
        """Always raises: the runner completes text only.

        Raises:
            NotSupportedError: Always.
        """
        raise embedding_error()

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_seconds: float | None = None,
    ) -> _Response:
        timeout = timeout_seconds or self.timeouts.call_seconds
        try:
            return await method(
                request, timeout=timeout, metadata=with_trace(self._access.metadata)
            )
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            raise await self._failure(error, timeout) from error

    async def _failure(
        self, error: BaseException, timeout_seconds: float | None = None
    ) -> RunnerError:
        return self._translated(error, timeout_seconds)

    async def close(self) -> None:
        """Closes the connection; pending calls end with ``RunnerUnavailableError``."""
        self._is_closed = True
        # Channels of older grpcio (1.80, for one) do not know of a stream that is read.
        for call in list(self._streams):
            call.cancel()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
