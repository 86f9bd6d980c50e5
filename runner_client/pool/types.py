"""States of a pool and its models, as reported to users."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runner_client.pool.scheduling.states import ModelState
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

_RETURNED_SHARE = 0.9
_RETURNED_SLACK_BYTES = 32 * 1024**2
"""Memory is back if free memory has grown by this share of what the process held, less the slack:
other processes of the machine take memory meanwhile."""


@dataclass(frozen=True, slots=True)
class PoolModel:
    """A model of a pool at one moment."""

    name: str
    """The model, as first requested."""
    path: str
    """The model's directory."""
    state: ModelState
    """The present state."""
    held_bytes: int
    """Memory that counts against the budget: the most that the runner may take; 0 if absent."""
    parts: Mapping[str, int] = field(hash=False)
    """The estimated need by part, in bytes."""
    progress: int = 0
    """Progress of a load, 0 to 100; 100 once the model is loaded."""
    reason: str = ""
    """What the first request for the model waits for, apart from a load in progress."""
    position: int = 0
    """Position of that request among all that wait, from 1; 0 if none waits."""
    leases: int = 0
    """Leases in use."""
    load_count: int = 0
    """Loads since the start of the pool."""
    waiting_count: int = 0
    """Requests that wait for the model."""
    idle_seconds: float | None = None
    """Time since the last lease ended, or since the load; None unless loaded and not in use."""
    is_pinned: bool = False
    """Whether the model is never evicted to make room."""
    last_error: str = ""
    """Why the last load failed, the last runner died, or its memory did not come back."""
    pid: int | None = None
    """Process id of the runner; None if there is none."""
    address: str | None = None
    """Address of the runner; None unless loaded."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A pool at one moment."""

    budget_bytes: int | None
    """The budget; None if only the machine limits the pool."""
    held_bytes: int
    """Memory that counts against the budget, of all models and spare processes."""
    models: tuple[PoolModel, ...]
    """Every model that was requested since the start of the pool."""
    spare_count: int = 0
    """Spare processes that have started and that a load can take."""
    spare_bytes: int = 0
    """The part of ``held_bytes`` of spare processes, including those that start or stop."""

    def model(self, name: str) -> PoolModel | None:
        """Return a model by name; None if it was never requested."""
        return next((model for model in self.models if model.name == name), None)


@dataclass(frozen=True, slots=True)
class MemoryReturn:
    """Memory of an evicted model's runner.

    Attributes:
        held_bytes: Memory that only this process held before the stop.
        returned_bytes: Growth of the machine's free memory and of the pool's other runners.
        seconds: Time from the exit of the process until that measurement.
    """

    held_bytes: int
    returned_bytes: int
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether the memory is back."""
        return self.returned_bytes >= _RETURNED_SHARE * self.held_bytes - _RETURNED_SLACK_BYTES

    def __str__(self) -> str:
        returned, held = format_bytes(max(0, self.returned_bytes)), format_bytes(self.held_bytes)
        return f"{returned} of the {held} it held came back within {self.seconds:.1f} s"


NOTHING = MemoryReturn(0, 0, 0.0)
"""The return of a model that was not loaded."""
