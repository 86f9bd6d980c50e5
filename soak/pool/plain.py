"""A runner without a pool, for one caller."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from runner_client import AsyncRunnerClient, AsyncRunnerProcess, MemoryGate
from soak.pool.models import OPTIONS
from soak.pool.records import PoolOrder

REQUESTS = 10
"""Requests after which the process is stopped. The next one may find too little memory."""


class PlainProcess:
    """An ``AsyncRunnerProcess`` that is started for a request, and stopped after ten.

    Args:
        model: Directory of the model.
        gate: Measures and reserves the machine's memory.
        env: Environment variables for the process.
        on_start: Called with the process id.
        on_stop: Called with the process id before the process is stopped.
    """

    def __init__(
        self,
        model: Path,
        gate: MemoryGate,
        env: Mapping[str, str],
        on_start: Callable[[int], None],
        on_stop: Callable[[int], None],
    ) -> None:
        self._model = model
        self._gate = gate
        self._env = env
        self._on_start = on_start
        self._on_stop = on_stop
        self._process: AsyncRunnerProcess | None = None
        self._requests = 0

    @asynccontextmanager
    async def lease(self, _: PoolOrder) -> AsyncIterator[AsyncRunnerClient]:
        """Give the client of the process, after starting it if necessary."""
        if self._process is None:
            self._process = await self._started()
        self._requests += 1
        try:
            yield self._process.client
        finally:
            if self._requests % REQUESTS == 0:
                await self.close()

    async def close(self) -> None:
        """Stop the process."""
        process, self._process = self._process, None
        if process is not None:
            self._on_stop(process.pid or 0)
            await process.close()

    async def _started(self) -> AsyncRunnerProcess:
        process = AsyncRunnerProcess(
            str(self._model), options=OPTIONS, gate=self._gate, env=self._env
        )
        try:
            await process.load()
            self._on_start(process.pid or 0)
            await process.wait_until_running()
        except BaseException:
            await process.close()
            raise
        return process
