"""Asyncio client of a local or remote runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from runner_client.checks import check_callable
from runner_client.rpc.aio_load import AsyncPendingLoad
from runner_client.rpc.aio_model_client import AsyncModelClient
from runner_client.rpc.messages import requests, responses
from runner_client.rpc.transport.base import DRAIN_SECONDS
from runner_client.types import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from runner_client.types import DrainResult, LoadEstimate, LoadKeywords, LoadResult, Status


class AsyncRunnerClient(AsyncModelClient):
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
