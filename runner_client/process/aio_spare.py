"""Asyncio runner whose child starts before its model is known."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from runner_client.errors import RunnerError
from runner_client.process.aio_process import AsyncRunnerProcess
from runner_client.process.aio_supervision import in_own_thread
from runner_client.process.launch import BareLaunch
from runner_client.rpc.transport.base import STATUS_SECONDS

if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import MemoryGate
    from runner_client.process.aio_supervision import Connection, Supervisor
    from runner_client.process.life import ChildLife
    from runner_client.rpc.aio_client import AsyncRunnerClient
    from runner_client.types import LoadOptions, Timeouts


class SpareProcess(AsyncRunnerProcess):
    """A runner that starts without a model, and loads one later.

    ``start`` starts the child, ``choose`` names the model, and ``load`` loads it. A load in the
    running child takes as long as one in a new child less the start of Python and the import of
    MLX. If the child has died or hangs, or if a new one would have another command line or
    environment, ``load`` replaces it by a new one first.

    The arguments are those of ``AsyncRunnerProcess``; ``require_full`` is True.
    """

    def __init__(
        self,
        *,
        gate: MemoryGate,
        timeouts: Timeouts | None,
        blas: str,
        env: Mapping[str, str] | None,
        log: logging.Logger | None,
    ) -> None:
        super().__init__(
            "none", require_full=True, gate=gate, timeouts=timeouts, blas=blas, env=env, log=log
        )
        self._chosen = self._launch
        self._launch = self._bare = BareLaunch.like(self._launch)
        self._starting = asyncio.Lock()
        self._supervisor: Supervisor | None = None

    @property
    def is_reserved(self) -> bool:
        """True once the machine's reservations include the child, with a model or without."""
        return self._life.plan is not None

    @property
    def estimate(self) -> MemoryEstimate | None:
        """The estimate checked by the gate; None before the gate has admitted the model."""
        plan = self._life.plan
        return None if plan is None or plan.launch is self._bare else plan.estimate

    @property
    def client(self) -> AsyncRunnerClient:
        """The client of the child, with a model or without."""
        if self._supervisor is not None and self._life.connection is None:
            return self._supervisor.client
        return super().client

    async def start(self) -> None:
        """Start the child, and return once it answers calls.

        Raises:
            InsufficientMemoryError: There is no memory for the process itself.
            RunnerError: The start failed, as for ``load``.
        """
        async with self._starting, self._new_life() as life:
            _, self._supervisor = await self._serve(life)

    def choose(self, model: str, options: LoadOptions) -> None:
        """Name the model that ``load`` loads."""
        self._chosen = replace(self._chosen, model=model, options=options)

    async def load(self) -> MemoryEstimate:
        """Start the load, after a start in progress; see ``AsyncRunnerProcess.load``."""
        async with self._starting:
            self._launch = self._chosen
            try:
                if estimate := await self._load_in(self._life):
                    return estimate
            except BaseException:
                await self.close()
                raise
            await self.close()
        return await super().load()

    async def close(self) -> None:
        """Stop the child, with a model or without; see ``AsyncRunnerProcess.close``."""
        supervisor, self._supervisor = self._supervisor, None
        try:
            await super().close()
        finally:
            if supervisor is not None:
                await supervisor.close()

    async def _load_in(self, life: ChildLife[Connection]) -> MemoryEstimate | None:
        """Start the load in the running child; return None if a new child is necessary."""
        if life.is_over or self._supervisor is None or not await self._answers():
            return None
        plan = await in_own_thread(functools.partial(life.admit, self._chosen))
        return None if plan is None else self._begin_load(life, plan, self._supervisor)

    async def _answers(self) -> bool:
        with contextlib.suppress(RunnerError):
            await self.client.status(timeout_seconds=STATUS_SECONDS)
            return True
        self.kill()
        return False
