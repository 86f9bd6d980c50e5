"""Supervision of a child in asyncio: health, stalls, start and close.

``supervision`` has the same names for the sync runner, which is generated from the asyncio runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from runner_client.errors import RunnerError, RunnerExitedError
from runner_client.process.base import HEALTH_SECONDS, not_serving
from runner_client.process.stall import StallDetector
from runner_client.rpc.transport.base import STATUS_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner_client.process.child import Child
    from runner_client.process.launch import Plan
    from runner_client.process.life import ChildLife
    from runner_client.rpc.aio_client import AsyncRunnerClient
    from runner_client.rpc.aio_load import AsyncPendingLoad
    from runner_common.handshake import ReadyLine

T = TypeVar("T")


class Supervisor:
    """Supervisor of a child and client; closes the client once the child exits."""

    def __init__(self, child: Child, client: AsyncRunnerClient) -> None:
        self.child = child
        self.client = client
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

    async def close(self) -> None:
        """Stop watching the engine, and close the client."""
        if self._watching is not None:
            self._watching.cancel()
        await self.client.close()

    async def wait_until_serving(self, deadline: float) -> None:
        """Poll the health service until the child reports SERVING.

        Args:
            deadline: In ``time.monotonic()`` seconds.

        Raises:
            RunnerExitedError: The child exited.
            RunnerTimeoutError: The deadline has passed (phase ``"start"``).
            RunnerUnavailableError: The child was closed.
        """
        while not await self._is_healthy():
            if self.child.has_exited:
                raise self.child.gone_error()
            if time.monotonic() > deadline:
                raise not_serving(self.client.address, self.client.timeouts)
            await asyncio.sleep(HEALTH_SECONDS)

    async def _is_healthy(self) -> bool:
        try:
            return await self.client.is_serving()
        except RunnerExitedError:
            raise
        except RunnerError:
            return False

    def start_watchdog(self) -> None:
        """Kill the child if the engine stalls for ``Timeouts.stall_seconds``, unless None."""
        stall_seconds = self.client.timeouts.stall_seconds
        if stall_seconds is not None:
            self._watching = self._loop.create_task(self._watch(StallDetector(stall_seconds)))

    async def _watch(self, detector: StallDetector) -> None:
        while not self.child.has_exited:
            await asyncio.sleep(detector.look_seconds)
            with contextlib.suppress(RunnerError):
                status = await self.client.status(timeout_seconds=STATUS_SECONDS)
                if stall := detector.observe(status):
                    self.child.kill(stall)


@dataclass(frozen=True)
class Connection:
    """The connection of a runner to its serving child: a supervised client and its load."""

    supervisor: Supervisor
    load: AsyncPendingLoad

    @property
    def client(self) -> AsyncRunnerClient:
        """The client of the child."""
        return self.supervisor.client

    async def end(self) -> None:
        """Close the client of a stopped child, and cancel a pending load."""
        await self.supervisor.close()
        # Retrieves the exception, in case the caller never waited for the load.
        await self.load.cancel()


async def in_own_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a thread that no other work can occupy.

    The event loop has few threads of its own: some children that print no ready line would occupy
    all of them for ``Timeouts.start_seconds``.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="runner-process")
    context = contextvars.copy_context()
    running = asyncio.get_running_loop().run_in_executor(executor, context.run, work)
    # The thread ends with the work.
    executor.shutdown(wait=False)
    return await running


async def start_blocking(life: ChildLife[Connection]) -> tuple[Plan, Child, ReadyLine]:
    """Start a child in a thread and wait for the ready line."""
    # The thread cannot be cancelled, but gives up once the life is closed.
    return await in_own_thread(life.start)


async def close_blocking(life: ChildLife[Connection]) -> None:
    """Close a child in a thread. Cancelling the task kills the child."""
    life.begin_close()
    closing = asyncio.create_task(in_own_thread(life.close))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        life.kill()
        await closing
        raise
