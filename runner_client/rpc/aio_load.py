"""Load in progress, started by an asyncio client."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from runner_client.errors import RunnerError
from runner_client.rpc.messages import responses
from runner_client.rpc.transport.base import STATUS_SECONDS
from runner_client.rpc.transport.waits import LoadWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner_client.rpc.aio_calls import LoadCall
    from runner_client.rpc.aio_client import AsyncRunnerClient
    from runner_client.types import LoadResult, Status


class AsyncPendingLoad:
    """Load in progress, as returned by ``AsyncRunnerClient.start_load``."""

    def __init__(self, client: AsyncRunnerClient, call: LoadCall) -> None:
        self._client = client
        self._call = call

    async def wait(self, on_progress: Callable[[Status], None] | None = None) -> LoadResult:
        """Wait for the load to finish. May be called again after a timeout.

        Args:
            on_progress: Called with a status about every 0.2 s.

        Raises:
            RunnerTimeoutError: The load made no progress for ``Timeouts.load_seconds``; it keeps
                running.
            RunnerError: The load failed; see ``AsyncRunnerClient.load``.
        """
        watch = LoadWatch(self._client.timeouts.load_seconds, time.monotonic())
        while (reply := await self._call.poll()) is None:
            await self._observe(watch, on_progress)
        return responses.load_result(reply)

    async def _observe(
        self, watch: LoadWatch, on_progress: Callable[[Status], None] | None
    ) -> None:
        try:
            status = await self._client.status(timeout_seconds=STATUS_SECONDS)
        except RunnerError:
            # The load itself reports failures, unless nothing answers at all.
            status = None
        watch.observe(status, time.monotonic())
        if status is not None and on_progress is not None:
            on_progress(status)

    async def cancel(self) -> None:
        """Cancel the load unless already finished."""
        await self._call.cancel()
