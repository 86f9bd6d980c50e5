"""Supervision of a child in asyncio: client, start and close.

``supervision`` has the same names for the sync runner, which is generated from the asyncio runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, TypeVar

from runner_client.errors import RunnerError, RunnerExitedError, RunnerUnavailableError
from runner_client.process.base import HEALTH_SECONDS, not_serving
from runner_client.process.stall import StallDetector
from runner_client.rpc.aio_client import AsyncRunnerClient
from runner_client.rpc.base import STATUS_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlxrunner.v1 import runner_pb2 as pb
    from runner_client.process.base import Ending
    from runner_client.process.child import Child
    from runner_client.rpc.aio_calls import LoadCall
    from runner_client.types import LoadResult, Status, Timeouts

_Result = TypeVar("_Result")


class ChildClient(AsyncRunnerClient):
    """Client of a child, aware of the child's exit."""

    def __init__(self, address: str, token: str, child: Child, timeouts: Timeouts) -> None:
        super().__init__(address, token=token, timeouts=timeouts)
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._closing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        # The system closes a dead child's connections, except for those that another process holds
        # open. Closing the client ends the calls on these too.
        child.on_exit(self._close_soon)

    def _close_soon(self) -> None:
        # A closed event loop has no calls left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._begin_close)

    def _begin_close(self) -> None:
        self._closing = self._loop.create_task(self.close())

    async def wait_until_serving(self, deadline: float) -> None:
        """Poll the health service until the child reports SERVING."""
        while not await self._is_healthy():
            if self._child.has_exited:
                raise self._child.gone_error()
            if time.monotonic() > deadline:
                raise not_serving(self.address, self.timeouts)
            await asyncio.sleep(HEALTH_SECONDS)

    async def _is_healthy(self) -> bool:
        try:
            return await self.is_serving()
        except RunnerExitedError:
            raise
        except RunnerError:
            return False

    def start_watchdog(self) -> None:
        """Kill the child if the engine stalls for ``Timeouts.stall_seconds``, unless None."""
        if self.timeouts.stall_seconds is not None:
            watch = StallDetector(self.timeouts.stall_seconds)
            self._watching = self._loop.create_task(self._watch_engine(watch))

    async def _watch_engine(self, watch: StallDetector) -> None:
        while not self._child.has_exited:
            await asyncio.sleep(watch.look_seconds)
            with contextlib.suppress(RunnerError):
                if stall := watch.observe(await self._status(STATUS_SECONDS)):
                    self._child.kill(stall)

    async def close(self) -> None:
        """Close the connection; see ``AsyncRunnerClient.close``."""
        if self._watching is not None:
            self._watching.cancel()
        await super().close()

    def start_load(self, request: pb.LoadRequest) -> LoadCall:
        """Start a load."""
        return self._start_load(request)

    async def finish_load(
        self, call: LoadCall, on_progress: Callable[[Status], None] | None
    ) -> LoadResult:
        """Wait for a load started by ``start_load``."""
        return await self._finish_load(call, on_progress)

    async def _status(self, timeout_seconds: float) -> Status:
        status = await super()._status(timeout_seconds)
        self._child.note_memory(status.memory_usage.process_bytes)
        return status

    @property
    def is_gone(self) -> bool:
        """True once the child has exited."""
        return self._child.has_exited

    async def end(self, call: LoadCall) -> None:
        """Close the connection of a dead child, and let the call of the load end."""
        await self.close()
        # Retrieve the exception, in case the caller never waited for the load.
        await asyncio.gather(call, return_exceptions=True)

    async def _failure(
        self, error: BaseException, timeout_seconds: float | None = None
    ) -> RunnerError:
        failure = await super()._failure(error, timeout_seconds)
        if not isinstance(failure, RunnerUnavailableError):
            return failure
        # ``explain`` may block until the child's exit is known.
        return await asyncio.to_thread(self._child.explain, failure)


async def start_blocking(start: Callable[[int], _Result], life: int) -> _Result:
    """Run a function that starts a child, in a thread."""
    # The thread cannot be cancelled, but gives up once its life is over.
    return await asyncio.to_thread(start, life)


async def close_blocking(close: Callable[[Ending], None], ending: Ending) -> None:
    """Run a function that closes a child, in a thread. Cancelling the task kills the child."""
    closing = asyncio.create_task(asyncio.to_thread(close, ending))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        if ending.child is not None:
            ending.child.kill()
        await closing
        raise
