"""A pool's scheduler with a clock, for tests of loads and evictions."""

from __future__ import annotations

from runner_client.pool.scheduling.scheduler import PoolScheduler
from runner_client.pool.scheduling.settings import ModelSettings, PoolSettings
from runner_client.pool.scheduling.states import (
    Action,
    EndSpare,
    Grant,
    Lease,
    Load,
    Need,
    PooledModel,
    Refuse,
    StartSpare,
    Ticket,
)

PLENTY = 10**6
SPARE_BYTES = 10


class Driver:
    """A scheduler with a clock; loads and evictions succeed when the test says so."""

    def __init__(self, budget: int | None = 100, machine: int = PLENTY, **settings: float) -> None:
        values = {"min_residence_seconds": 0.0, "max_wait_seconds": 10.0, **settings}
        given = PoolSettings(budget_bytes=budget, **values)  # type: ignore[arg-type]
        self.scheduler = PoolScheduler(given, SPARE_BYTES)
        self.machine = machine
        self.now = 0.0

    def model(
        self, name: str, total: int, required: int | None = None, **settings: object
    ) -> PooledModel:
        """Return a model without a keep-alive limit."""
        given = ModelSettings(**{"keep_alive_seconds": None, **settings})  # type: ignore[arg-type]
        return self.scheduler.model(name, given, Need(total, required or total))

    def ask(self, model: PooledModel, **options: bool) -> Ticket:
        """Request a model."""
        return self.scheduler.request(self.now, model, **options)

    def decide(self, seconds: float = 0.0) -> list[Action]:
        """Let time pass, and return the actions decided then."""
        self.now += seconds
        return self.scheduler.decide(self.now, self.machine)

    def lease(self, model: PooledModel) -> Lease:
        """Lease a model, loaded or with room, and return the lease."""
        self.ask(model)
        action, *_ = self.decide()
        if isinstance(action, Load):
            self.scheduler.loaded(self.now, model, model.need.total_bytes)
            action, *_ = self.decide()
        assert isinstance(action, Grant)
        assert action.lease is not None
        return action.lease

    def use(self, model: PooledModel) -> None:
        """Lease and release a model."""
        self.scheduler.release(self.now, self.lease(model))


def names(actions: list[Action]) -> list[tuple[str, str]]:
    """Return kinds and models of actions."""
    return [(type(action).__name__, _model_name(action)) for action in actions]


def _model_name(action: Action) -> str:
    match action:
        case Grant(ticket) | Refuse(ticket):
            return ticket.model.name
        case StartSpare() | EndSpare():
            return ""
    return action.model.name
