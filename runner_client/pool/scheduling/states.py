"""Models, requests and decisions of a pool's scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner_client.pool.scheduling.settings import ModelSettings


class ModelState(StrEnum):
    """State of a model in a pool."""

    ABSENT = "absent"
    """Not in memory."""
    LOADING = "loading"
    """A runner starts and loads the model."""
    READY = "ready"
    """The model answers requests."""
    EVICTING = "evicting"
    """The runner stops; its memory is not back yet."""


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that a model needs, in bytes.

    Attributes:
        total_bytes: The most that the runner may take; counts against the budget.
        required_bytes: The least that the machine must have free: the total without a prefix cache
            of the default size.
    """

    total_bytes: int
    required_bytes: int


@dataclass(slots=True, eq=False)
class Ticket:
    """A request for a model, from its arrival to its grant or refusal.

    Attributes:
        model: The model.
        arrived: Time of arrival, in seconds.
        order: Position among all tickets; the lowest is served first.
        may_evict: Whether other models may be evicted for it.
        is_lease: Whether the grant is a lease; False for a request to load only.
        reason: What it waits for, as text; empty if it waits for nothing but its own load.
        is_hopeless: Whether no eviction could make room for it, as of the last decision.
    """

    model: PooledModel
    arrived: float
    order: tuple[float, int]
    may_evict: bool
    is_lease: bool
    reason: str = ""
    is_hopeless: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease of one life of a model's runner."""

    model: PooledModel
    life: int


@dataclass(slots=True, eq=False)
class PooledModel:
    """A model, as seen by the scheduler.

    Attributes:
        name: The model, as requested.
        settings: The model's settings.
        is_pinned: Whether it is pinned; at first as in the settings.
        need: The memory it needs.
        state: The present state.
        held_bytes: Memory counted for it: its total need from the start of a load until the memory
            of its runner is back. 0 while it is absent.
        life: Number of loads so far.
        leases: Leases of the present life.
        began_at: Time at which the present load began, in seconds.
        ready_at: Time at which the present life was loaded.
        idle_since: Time of its last use.
        yields_to: The ticket for which it is about to be evicted: no new leases until then.
        short_since: Since when its first request is hopeless; None if it is not.
        chosen_seconds: The keep-alive that a request has chosen for the present life, in seconds;
            ``inf`` pins it, None leaves it to the settings.
    """

    name: str
    settings: ModelSettings
    is_pinned: bool
    need: Need
    state: ModelState = ModelState.ABSENT
    held_bytes: int = 0
    life: int = 0
    leases: int = 0
    began_at: float = 0.0
    ready_at: float = 0.0
    idle_since: float = 0.0
    yields_to: Ticket | None = None
    short_since: float | None = None
    chosen_seconds: float | None = None

    @property
    def stays(self) -> bool:
        """Whether the model is pinned, by the settings, a caller or a request."""
        return self.is_pinned or self.chosen_seconds == math.inf

    @property
    def keep_alive_seconds(self) -> float:
        """Time for which the idle model stays loaded; ``inf`` without a limit."""
        if self.chosen_seconds is not None:
            return self.chosen_seconds
        configured = self.settings.keep_alive_seconds
        return math.inf if configured is None else configured

    @property
    def is_held(self) -> bool:
        """Whether it is loaded or being loaded."""
        return self.state in (ModelState.LOADING, ModelState.READY)

    @property
    def is_idle(self) -> bool:
        """Whether it is loaded and has no lease."""
        return self.state is ModelState.READY and self.leases == 0


@dataclass(slots=True, eq=False)
class Spare:
    """A spare process: a runner without a model, which one load will take.

    Attributes:
        held_bytes: Memory counted for it, from its start until a load takes it or its memory is
            back.
        is_ready: Whether it has started.
        is_ending: Whether it is being stopped.
    """

    held_bytes: int
    is_ready: bool = False
    is_ending: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Give a ticket its model. ``lease`` is None for a request to load only."""

    ticket: Ticket
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class Load:
    """Start a runner for a model; report ``loaded`` or ``gone``.

    Attributes:
        model: The model.
        spare: The spare process that becomes its runner; None for a new process.
    """

    model: PooledModel
    spare: Spare | None = None


@dataclass(frozen=True, slots=True)
class Evict:
    """Stop a model's runner, and report ``gone`` once its memory is back."""

    model: PooledModel
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refuse a ticket for lack of memory.

    Attributes:
        ticket: The ticket.
        required_bytes: Memory that the model needs.
        available_bytes: Memory that it could have.
        text: Why, with the numbers.
    """

    ticket: Ticket
    required_bytes: int
    available_bytes: int
    text: str


@dataclass(frozen=True, slots=True)
class StartSpare:
    """Start a spare process, and set ``is_ready``; or report ``gone``."""

    spare: Spare


@dataclass(frozen=True, slots=True)
class EndSpare:
    """Stop a spare process, and report ``gone`` once its memory is back."""

    spare: Spare
    reason: str


Action = Grant | Load | Evict | Refuse | StartSpare | EndSpare
