"""Limits the prefix cache to the free memory of the machine."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from runner_common.units import format_bytes
from runner_server.errors import RunnerFault

if TYPE_CHECKING:
    from runner_server.engine.engine import Engine
    from runner_server.host.machine_admission import MachineAdmission

logger = logging.getLogger(__name__)

_CPU_SECONDS, _GPU_SECONDS = 1.0, 5.0
"""Interval between measurements of free memory. On CUDA each one runs ``nvidia-smi``."""

_LEAST_CHANGE_BYTES = 1 << 20


class PressureWatch:
    """Adjusts the budget of the prefix cache to the free memory of the machine.

    The prefix cache is the only memory that a runner can give up at no cost but time. The runner's
    reservation does not change.

    Args:
        engine: The engine that holds the prefix cache.
        admission: Measures the spare memory of the machine.
    """

    def __init__(self, engine: Engine, admission: MachineAdmission) -> None:
        self._engine = engine
        self._admission = admission

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(_GPU_SECONDS if self._is_gpu else _CPU_SECONDS)
            model = self._engine.state().model
            if model is None:
                continue
            memory = self._engine.memory()
            if self._is_gpu:
                self._admission.note_held(memory.held_bytes)
            if model.prefix_cache_bytes:
                spare = await asyncio.to_thread(self._admission.spare_bytes)
                self._adjust(
                    held=memory.prefix_cache_bytes,
                    limit=memory.prefix_cache_limit_bytes,
                    most=model.prefix_cache_bytes,
                    spare=spare,
                )

    @property
    def _is_gpu(self) -> bool:
        return self._engine.device.startswith("gpu")

    def _adjust(self, *, held: int, limit: int, most: int, spare: int) -> None:
        """Set the budget to the cache's size plus the spare memory, unless the change is small."""
        wanted = max(0, min(most, held + spare))
        if wanted == limit or (wanted < most and abs(wanted - limit) < _LEAST_CHANGE_BYTES):
            return
        if wanted < limit:
            logger.warning(
                "memory is short: the prefix cache holds %s and may take %s now",
                format_bytes(held),
                format_bytes(wanted),
            )
        self._engine.limit_prefix_cache(wanted)
        if wanted < held:
            # Return the evicted memory to the system at once. If the trim is refused, a load or a
            # shutdown has begun, which frees the memory anyway.
            with suppress(RunnerFault):
                self._engine.trim(wanted)
