"""Descriptions of a pool's models for callers and watchers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from runner_client.pool.scheduling.states import ModelState
from runner_client.pool.types import PoolModel, PoolStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from runner_client.pool.aio_entry import Entry
    from runner_client.pool.scheduling.scheduler import PoolScheduler
    from runner_client.pool.scheduling.settings import PoolSettings
    from runner_client.pool.scheduling.states import Ticket


def describe(entry: Entry, waiting: Sequence[Ticket]) -> PoolModel:
    """Return the present state of a model.

    Args:
        entry: The model.
        waiting: All requests that wait, first come first.
    """
    model, member = entry.model, entry.member
    own = [ticket for ticket in waiting if ticket.model is model]
    is_loaded = model.state is ModelState.READY
    return PoolModel(
        name=model.name,
        path=entry.appraisal.estimate.path,
        state=model.state,
        held_bytes=model.held_bytes,
        parts=entry.appraisal.estimate.parts,
        progress=member.progress if member else 0,
        reason=own[0].reason if own else "",
        position=waiting.index(own[0]) + 1 if own else 0,
        leases=model.leases,
        load_count=model.life,
        waiting_count=len(own),
        idle_seconds=time.monotonic() - model.idle_since if model.is_idle else None,
        is_pinned=model.stays,
        last_error=entry.last_error,
        pid=member.process.pid if member else None,
        address=member.process.address if member and is_loaded else None,
    )


def describe_pool(
    settings: PoolSettings, scheduler: PoolScheduler, models: tuple[PoolModel, ...]
) -> PoolStatus:
    """Return the present state of a pool."""
    return PoolStatus(
        budget_bytes=settings.budget_bytes,
        held_bytes=scheduler.held_bytes,
        models=models,
        spare_count=scheduler.spares.ready_count,
        spare_bytes=scheduler.spares.held_bytes,
    )


class ProgressReport:
    """Calls a callback when a model's state, progress or reason to wait has changed.

    Args:
        describe_model: Returns the present state of the model.
        on_progress: The callback.
    """

    def __init__(
        self, describe_model: Callable[[], PoolModel], on_progress: Callable[[PoolModel], None]
    ) -> None:
        self._describe_model = describe_model
        self._on_progress = on_progress
        self._last: tuple[object, ...] = ()

    def __call__(self) -> None:
        """Call the callback if something has changed."""
        model = self._describe_model()
        seen = model.state, model.progress, model.reason, model.position
        if seen != self._last:
            self._last = seen
            self._on_progress(model)
