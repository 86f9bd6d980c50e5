"""State of one model of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_client.pool.types import NOTHING, MemoryReturn

if TYPE_CHECKING:
    import asyncio

    from runner_client.pool.aio_member import Member
    from runner_client.pool.appraisal import Appraisal
    from runner_client.pool.scheduling.states import PooledModel
    from runner_client.types import RestartPolicy


@dataclass(slots=True, eq=False)
class Entry:
    """A model of a pool: the scheduler's view, the runner and the history.

    Attributes:
        model: The scheduler's view.
        appraisal: The need and the options of the next load.
        member: The runner; None while the model is absent.
        task: The load or eviction in progress, or the last one.
        deaths: Times at which a runner of the model died, in ``time.monotonic()`` seconds.
        last_error: Why the last load failed, the last runner died, or memory did not come back.
        refused_count: Loads in a row that the machine refused.
        last_return: Memory that came back at the last eviction.
        last_reason: What the last request that gave up had waited for.
    """

    model: PooledModel
    appraisal: Appraisal
    member: Member | None = None
    task: asyncio.Task[None] | None = None
    deaths: tuple[float, ...] = ()
    last_error: str = ""
    refused_count: int = 0
    last_return: MemoryReturn = NOTHING
    last_reason: str = ""

    def refusal(self, policy: RestartPolicy, now: float) -> str:
        """Return the refusal of a model with too many recent deaths; empty otherwise."""
        recent = policy.recent(self.deaths, now)
        if len(recent) <= policy.max_restarts:
            return ""
        rest = recent[-policy.max_restarts - 1] + policy.window_seconds - now
        return (
            f"runners of {self.model.name} have died {len(recent)} times within "
            f"{policy.window_seconds:g} s; it is refused for another {rest:.0f} s. The last one: "
            f"{self.last_error}"
        )
