"""Return of memory to other programs of the machine."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from runner_client.pool.scheduling.states import ModelState
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from runner_client.memory.gate import MemoryGate
    from runner_client.pool.aio_manager import PoolManager

logger = logging.getLogger(__name__)

_CPU_SECONDS, _GPU_SECONDS = 1.0, 5.0
"""Interval between measurements of free memory. On CUDA each one runs ``nvidia-smi``."""


class PressureRelief:
    """Gives memory back while free memory is below a reserve.

    Spare processes go first, then the content of prefix caches, then idle models.

    Args:
        manager: The pool.
        gate: Measures free memory.
        reserve_bytes: The reserve; None for the headroom of the gate.
    """

    def __init__(self, manager: PoolManager, gate: MemoryGate, reserve_bytes: int | None) -> None:
        self._manager = manager
        self._gate = gate
        self._reserve_bytes = reserve_bytes
        self._has_trimmed = False

    async def run(self) -> None:
        """Watch until cancelled."""
        seconds = _CPU_SECONDS
        while True:
            await asyncio.sleep(seconds)
            members = (entry.member for entry in self._manager.entries.values())
            if any(members) or self._manager.spares.processes:
                decision = await asyncio.to_thread(self._gate.available)
                seconds = _CPU_SECONDS if decision.free.device_kind == "cpu" else _GPU_SECONDS
                reserve = self._reserve_bytes
                reserve = decision.overhead_bytes if reserve is None else reserve
                await self._relieve(decision.free.available_bytes, reserve)

    async def _relieve(self, free_bytes: int, reserve_bytes: int) -> None:
        """Free one kind of memory, and leave the rest to the next measurement."""
        if free_bytes >= reserve_bytes:
            self._has_trimmed = False
            return
        scheduler = self._manager.scheduler
        is_evicting = any(model.state is ModelState.EVICTING for model in scheduler.models)
        if is_evicting or scheduler.spares.ending_bytes:
            # Its memory is not back yet.
            return
        what = f"{format_bytes(free_bytes)} of {format_bytes(reserve_bytes)} are free"
        if self._manager.end_spare(what):
            logger.warning("%s: stopping a spare process", what)
            return
        members = [
            entry.member
            for entry in self._manager.entries.values()
            if entry.member and entry.model.state is ModelState.READY
        ]
        # Models in use fill their caches again, so idle ones go if that was not enough once.
        if not (self._has_trimmed and scheduler.idle_models()):
            self._has_trimmed = True
            if freed := sum(await asyncio.gather(*(member.trim() for member in members))):
                logger.warning("%s: prefix caches gave back %s", what, format_bytes(freed))
                return
        if idle := scheduler.idle_models():
            logger.warning("%s: evicting %s", what, idle[0].name)
            self._manager.begin_eviction(self._manager.entries[idle[0].name], what)
