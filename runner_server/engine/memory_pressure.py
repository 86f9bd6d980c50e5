"""Keeps the prefix cache within the memory that the machine has at the moment."""

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
"""How often free memory is measured. On CUDA that starts ``nvidia-smi``."""

_LEAST_CHANGE_BYTES = 1 << 20


class PressureWatch:
    """Lowers the limit of the prefix cache when free memory runs short, and raises it again.

    Evaluated prompts are the one part of a runner's memory that costs only time to give up.
    What the runner has reserved stays reserved for it.

    Args:
        engine: The engine whose prefix cache it is.
        admission: Tells how much memory is to spare.
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
                self._admission.note_held(memory.active_bytes + memory.cache_bytes)
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
        """Set the limit to what is held and what may be added, if that is another one."""
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
            # What was dropped is to go back to the system at once; a load that has begun
            # meanwhile, or the end, frees all of it.
            with suppress(RunnerFault):
                self._engine.trim(wanted)
