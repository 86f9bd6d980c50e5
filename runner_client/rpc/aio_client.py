"""Asyncio client of a local or remote runner."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NoReturn, Self, Unpack

from runner_client.checks import check_callable, check_number, check_text
from runner_client.rpc.aio_calls import Connection
from runner_client.rpc.aio_load import AsyncPendingLoad
from runner_client.rpc.messages import requests, responses
from runner_client.rpc.transport import health
from runner_client.rpc.transport.base import DRAIN_SECONDS, embedding_error
from runner_client.types import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from runner_client.rpc.aio_stream import AsyncCompletionStream, AsyncStatusStream
    from runner_client.rpc.transport.base import Peer
    from runner_client.types import (
        Completion,
        DrainResult,
        LoadEstimate,
        LoadKeywords,
        LoadResult,
        Options,
        Status,
        Timeouts,
        TlsFiles,
    )


class AsyncRunnerClient:
    """Asyncio client for a runner at a known address.

    A client belongs to the event loop of its first call; any number of its tasks may share it.
    A client does not survive a fork, because gRPC does not: create it after the fork, or spawn.

    The first call opens the connection. ``status``, ``estimate``, ``tokenize`` and
    ``detokenize`` are retried up to twice if the runner is unreachable, other calls never.
    Cancelling a task cancels its call and raises ``asyncio.CancelledError`` as usual.

    Args:
        address: ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:/path``.
        token: The server's token, sent with every call; without TLS in plain text.
        tls: Certificates for an encrypted connection. Default: no encryption.
        timeouts: How long to wait for each kind of answer.
        peer: The process at the address, if the caller owns it, as ``AsyncRunnerProcess`` does.

    Raises:
        ValueError: The address is invalid, the token cannot be sent, or a file of ``tls`` has no
            certificate or key.
        OSError: A file of ``tls`` cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: TlsFiles | None = None,
        timeouts: Timeouts | None = None,
        peer: Peer | None = None,
    ) -> None:
        self._connection = Connection(address, timeouts, token, tls, peer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    @property
    def address(self) -> str:
        """The runner's address, as passed to gRPC."""
        return self._connection.address

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of this client."""
        return self._connection.timeouts

    async def load(
        self,
        model: str,
        *,
        options: LoadOptions | None = None,
        on_progress: Callable[[Status], None] | None = None,
        **keywords: Unpack[LoadKeywords],
    ) -> LoadResult:
        """Load a model and wait for the load to finish.

        The load is cancelled if it makes no progress for ``Timeouts.load_seconds``, or if an
        exception (an interrupt, an error in ``on_progress``) ends this method early.

        Args:
            model: A directory on the server's machine, or a hub id in its local cache.
            options: Options of the load.
            on_progress: Called with a status about every 0.2 s.
            keywords: Fields of ``LoadOptions``, in place of those of ``options``.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument is out of range.
            ModelNotFoundError: The model does not exist.
            ModelUnsupportedError: The model cannot be loaded.
            InsufficientMemoryError: The model does not fit into memory.
            BusyError: Another load or an unload is running.
            RunnerTimeoutError: The load made no progress for too long (phase ``"load"``).
            RunnerError: The call failed for another reason.
        """
        check_callable("on_progress", on_progress)
        load = self.start_load(model, options=options, **keywords)
        try:
            return await load.wait(on_progress)
        finally:
            await load.cancel()

    def start_load(
        self, model: str, *, options: LoadOptions | None = None, **keywords: Unpack[LoadKeywords]
    ) -> AsyncPendingLoad:
        """Start a load and return without waiting. The arguments are those of ``load``.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument cannot be sent.
            RunnerUnavailableError: The client is closed.
        """
        request = requests.load_request(model, LoadOptions.of(options, keywords))
        return AsyncPendingLoad(self, self._connection.start_load(request))

    async def estimate(
        self, model: str, *, options: LoadOptions | None = None, **keywords: Unpack[LoadKeywords]
    ) -> LoadEstimate:
        """Estimate the memory needed by a load, and whether the model fits now.

        A model too large for the machine is not an error, and a loaded model keeps working. The
        first call for a model takes about half a second; ``Timeouts.call_seconds`` applies. The
        arguments are those of ``load``.

        Raises:
            InvalidRequestError: An argument is out of range.
            ModelNotFoundError: The model does not exist.
            ModelUnsupportedError: The model cannot be loaded.
            InsufficientMemoryError: One sequence does not fit ``memory_limit_bytes``.
            RunnerError: The call failed for another reason.
        """
        request = requests.estimate_request(model, LoadOptions.of(options, keywords))
        return responses.load_estimate(
            await self._connection.call(self._connection.stub.Estimate, request)
        )

    async def trim(self, *, prefix_cache_bytes: int | None = None, model: str | None = None) -> int:
        """Free memory without ending a completion, and return the bytes freed.

        The runner evicts entries of the prefix cache first, then frees buffers that MLX and the
        heap keep for reuse. The trim waits for the current step and delays running completions
        by a fraction of a second; ``Timeouts.call_seconds`` applies.

        Args:
            prefix_cache_bytes: The size of the prefix cache to keep; it may grow again. Default: 0.
            model: See ``completion``.

        Raises:
            InvalidRequestError: The size is negative.
            ModelNotLoadedError: ``model`` is not the loaded model.
            BusyError: A load or an unload is running.
            RunnerError: The call failed for another reason.
        """
        request = requests.trim_request(prefix_cache_bytes, model)
        return (await self._connection.call(self._connection.stub.Trim, request)).freed_bytes

    async def unload(self, *, model: str | None = None) -> int:
        """End running and queued completions, free the model, and return the bytes freed.

        Args:
            model: See ``completion``.

        Raises:
            BusyError: A load or another unload is running.
            ModelNotLoadedError: ``model`` is not the loaded model.
            RunnerError: The call failed for another reason.
        """
        request = requests.unload_request(model)
        return (await self._connection.call(self._connection.stub.Unload, request)).freed_bytes

    async def status(
        self, *, timeout_seconds: float | None = None, model: str | None = None
    ) -> Status:
        """Return the runner's current state, model and memory. Works during a load, too.

        Args:
            timeout_seconds: The deadline of this call. Default: ``Timeouts.call_seconds``.
            model: See ``completion``.

        Raises:
            ModelNotLoadedError: ``model`` is not the loaded model.
            RunnerError: The call failed for another reason.
        """
        check_number("timeout_seconds", timeout_seconds)
        request = requests.status_request(model)
        reply = await self._connection.call(self._connection.stub.Status, request, timeout_seconds)
        status = responses.status(reply)
        self._connection.note_status(status)
        return status

    def watch_status(self, *, interval_seconds: float | None = None) -> AsyncStatusStream:
        """Watch the runner: return a stream of statuses, the first at once, without waiting.

        Another status follows each change of state, progress, counts, model or last error, at most
        20 a second. Reading raises ``RunnerTimeoutError`` without a first status in
        ``Timeouts.call_seconds``, or without another one in that time after each interval.

        Args:
            interval_seconds: The longest time between two statuses, 0.1 to 3,600, to notice a
                runner that hangs. Default: a status after changes only.

        Raises:
            TypeError: The interval is not a number.
            InvalidRequestError: The interval is out of range.
            RunnerUnavailableError: The client is closed. Reading raises all other errors.
        """
        request = requests.watch_request(interval_seconds)
        return self._connection.start_watch(request, interval_seconds)

    async def ping(self) -> float:
        """Request a status and return the round-trip time, in seconds.

        Raises:
            RunnerError: The call failed.
        """
        begin = time.monotonic()
        await self.status()
        return time.monotonic() - begin

    async def is_serving(self, service: str = "") -> bool:
        """Return whether ``grpc.health.v1`` reports SERVING, which does not require a model.

        Args:
            service: A full service name; "" is the whole server.

        Raises:
            RunnerError: The call failed, or the service is unknown.
        """
        check_text("service", service)
        return health.is_serving(
            await self._connection.call(self._connection.health, health.request(service))
        )

    def completion(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        model: str | None = None,
    ) -> AsyncCompletionStream:
        """Start a completion and return the stream of chunks without waiting.

        Reading raises ``RunnerTimeoutError`` after ``Timeouts.first_token_seconds`` without a
        token, or ``Timeouts.idle_seconds`` without any message.

        Args:
            prompt: Text, or token ids, which are used unchanged.
            options: Sampling and stop options.
            logprobs: The number of most likely tokens, 0 to 20, to report with the log
                probability of each token. Default: no log probabilities.
            request_id: A name for the request in the server's log, and for ``abort``.
            priority: Higher first among waiting completions, -100 to 100. Each second of waiting
                counts like one level.
            model: The model that is meant, by the name it was loaded with or its path; another
                one is refused. Default: the loaded model.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument cannot be sent.
            RunnerUnavailableError: The client is closed. Reading raises all other errors.
        """
        request = requests.completion_request(
            prompt,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            model=model,
        )
        return self._connection.start_stream(request)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        model: str | None = None,
    ) -> Completion:
        """Run a completion to the end, with the arguments and timeouts of ``completion``.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument is out of range.
            PromptTooLongError: The prompt does not fit the context.
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            QueueFullError: Too many requests are waiting.
            RunnerTimeoutError: No token, or no message, arrived in time.
            RunnerError: The completion failed for another reason.
        """
        stream = self.completion(
            prompt,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            model=model,
        )
        async with stream:
            return responses.join_chunks([chunk async for chunk in stream])

    async def abort(self, request_ids: Sequence[str]) -> int:
        """End running and queued completions, and return how many ended.

        Reading an ended completion raises ``RequestAbortedError``.

        Args:
            request_ids: The ``request_id`` of each completion to end, 1 to 1,024 of them. All
                completions with one of these ids end; an id that none has is not an error.

        Raises:
            TypeError: The ids are not a sequence of strings.
            InvalidRequestError: There is no id, or one is empty or too long.
            RunnerError: The call failed for another reason.
        """
        request = requests.abort_request(request_ids)
        return (await self._connection.call(self._connection.stub.Abort, request)).aborted_count

    async def drain(self, timeout_seconds: float | None = None) -> DrainResult:
        """Refuse new completions, and wait until running and queued ones have ended.

        The runner still refuses new completions afterwards, with ``ShuttingDownError``, until a
        model is loaded. Ending this call early, by cancelling its task for instance, makes the
        runner accept them again.

        Args:
            timeout_seconds: Time after which the completions that are left are ended, 0 to
                86,400. Their readers get ``RequestAbortedError``. Default: no limit.

        Raises:
            InvalidRequestError: The timeout is out of range.
            RunnerError: The call failed for another reason.
        """
        request = requests.drain_request(timeout_seconds)
        return responses.drain_result(
            await self._connection.call(self._connection.stub.Drain, request, DRAIN_SECONDS)
        )

    async def tokenize(
        self, content: str, *, add_special_tokens: bool = False, model: str | None = None
    ) -> list[int]:
        """Split text into the model's token ids.

        Args:
            content: The text.
            add_special_tokens: Whether to add the special tokens that a completion's prompt gets.
            model: See ``completion``.

        Raises:
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            RunnerError: The call failed for another reason.
        """
        request = requests.tokenize_request(
            content, add_special_tokens=add_special_tokens, model=model
        )
        return list(
            (await self._connection.call(self._connection.stub.Tokenize, request)).token_ids
        )

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """Join token ids into text: the inverse of ``tokenize``.

        Args:
            token_ids: The ids.
            model: See ``completion``.

        Raises:
            InvalidRequestError: An id is not in the vocabulary.
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            RunnerError: The call failed for another reason.
        """
        request = requests.detokenize_request(token_ids, model)
        return (await self._connection.call(self._connection.stub.Detokenize, request)).content

    async def embedding(self, content: str) -> NoReturn:  # noqa: ARG002 - the interface has it
        """Refuse the call: the runner only completes text.

        Raises:
            NotSupportedError: Always.
        """
        raise embedding_error()

    async def close(self) -> None:
        """Close the connection. Pending calls raise ``RunnerUnavailableError``."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
