"""The runner of one model of a pool: start, load, stop, and the return of its memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from runner_client.errors import RunnerError, RunnerUnavailableError
from runner_client.pool.types import MemoryReturn
from runner_client.rpc.transport.base import STATUS_SECONDS
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import MemoryGate
    from runner_client.process.aio_process import AsyncRunnerProcess
    from runner_client.rpc.aio_client import AsyncRunnerClient
    from runner_client.types import Status


@dataclass(frozen=True, slots=True)
class Departure:
    """A stopped and reaped runner.

    Attributes:
        measure: Returns free memory and that of the pool's other runners, in bytes.
        before_bytes: The same before the stop.
        held_bytes: Memory that only this process held.
        ended_at: Time of the exit, in ``time.monotonic()`` seconds.
    """

    measure: Callable[[], int]
    before_bytes: int
    held_bytes: int
    ended_at: float

    async def returned(self) -> MemoryReturn:
        """Measure how much of the memory is back."""
        returned_bytes = await asyncio.to_thread(self.measure) - self.before_bytes
        return MemoryReturn(self.held_bytes, returned_bytes, time.monotonic() - self.ended_at)


class Member:
    """A model's runner in a pool. Used once: one load, one stop.

    Args:
        process: The runner, not started yet.
        gate: Measures free memory.
        spare_bytes: The need of the process before its load; 0 for a process that is not started.
    """

    def __init__(self, process: AsyncRunnerProcess, gate: MemoryGate, spare_bytes: int = 0) -> None:
        self._process = process
        self._gate = gate
        self._spare_bytes = spare_bytes
        self.progress = 0
        """Progress of the load, 0 to 100."""

    def unreserved_bytes(self, need_bytes: int) -> int:
        """Return the part of a need that the machine's reservations do not include yet."""
        if self._process.estimate is not None:
            return 0
        # A process has a token once it is admitted, with a model or without.
        return need_bytes - (0 if self._process.token is None else self._spare_bytes)

    @property
    def process(self) -> AsyncRunnerProcess:
        """The runner's process."""
        return self._process

    @property
    def client(self) -> AsyncRunnerClient:
        """The client of the loaded runner."""
        return self._process.client

    async def load(self, on_progress: Callable[[], None], most_bytes: int) -> int:
        """Start the runner and load the model. A failure leaves nothing behind.

        Args:
            on_progress: Called when ``progress`` has changed.
            most_bytes: The need that the pool has found room for.

        Returns:
            The memory reserved for the runner, in bytes.

        Raises:
            RunnerError: The start or the load failed.
            RunnerUnavailableError: The model needs more, because its files have changed.
        """

        def note(status: Status) -> None:
            if status.progress != self.progress:
                self.progress = status.progress
                on_progress()

        try:
            estimate = await self._process.load()
            _check_need(estimate, most_bytes)
            await self._process.wait_until_running(note)
            status = await self._process.status()
        except BaseException:
            await self._process.close()
            raise
        self.progress = 100
        return status.memory_usage.reserved_bytes or estimate.total_bytes

    async def trim(self) -> int:
        """Empty the prefix cache, and return the bytes freed; 0 if the runner refuses."""
        with contextlib.suppress(RunnerError):
            if (await self._status()).memory_usage.prefix_cache_bytes:
                return await self._process.trim()
        return 0

    @property
    def taken_bytes(self) -> int:
        """Memory that the runner holds now: MLX's on a GPU as of the last status, else its own."""
        if any(device.kind == "gpu" for device in self._process.device_infos):
            return self._process.memory_size
        return 0 if self._process.pid is None else _own_bytes(self._process.pid)

    async def stop(self, others_bytes: Callable[[], int]) -> Departure:
        """Stop the runner and reap the process.

        Args:
            others_bytes: Returns the memory that the other runners of the pool hold. They may take
                the memory of this one.
        """

        def measure() -> int:
            return self._free_bytes() + others_bytes()

        try:
            before_bytes = await asyncio.to_thread(measure)
            held_bytes = await self._held_bytes()
        except BaseException:
            self._process.kill()
            await self._process.close()
            raise
        await self._process.close()
        return Departure(measure, before_bytes, held_bytes, time.monotonic())

    def _free_bytes(self) -> int:
        return self._gate.available().free.available_bytes

    async def _held_bytes(self) -> int:
        """Return the memory freed by the exit: MLX's on a GPU, otherwise the private pages."""
        with contextlib.suppress(RunnerError):
            status = await self._status()
            if status.device.startswith("gpu"):
                return status.memory_bytes
        pid = self._process.pid
        return 0 if pid is None else await asyncio.to_thread(_private_bytes, pid)

    async def _status(self) -> Status:
        """Return the status, soon: a runner that hangs must not delay the pool."""
        return await self._process.client.status(timeout_seconds=STATUS_SECONDS)


def _check_need(estimate: MemoryEstimate, most_bytes: int) -> None:
    if estimate.total_bytes > most_bytes:
        raise RunnerUnavailableError(
            f"the files of {estimate.model} have changed since the request: it needs "
            f"{format_bytes(estimate.total_bytes)} now, instead of {format_bytes(most_bytes)}; "
            "request it again"
        )


def _own_bytes(pid: int) -> int:
    """Return a resident set, on Linux without the pages of files."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))


def _private_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0
