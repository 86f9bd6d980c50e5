"""Choice of the models to evict, and the messages about the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from runner_client.pool.scheduling.states import PooledModel


_NO_EVICTION = "The caller asked for no eviction: wait, evict a model, or allow it"


def rank(model: PooledModel) -> tuple[bool, int, float]:
    """Order of eviction: idle before used, low priority first, then least recently used first."""
    used = not model.is_idle
    return used, model.settings.priority, model.ready_at if used else model.idle_since


def cover(models: list[PooledModel], short: int) -> list[PooledModel]:
    """Return the first models that hold ``short`` bytes together, without superfluous ones.

    Empty if all of them do not.
    """
    chosen: list[PooledModel] = []
    total = 0
    for model in models:
        if total >= short:
            break
        chosen.append(model)
        total += model.held_bytes
    if total < short:
        return []
    for model in reversed(chosen.copy()):
        if total - model.held_bytes >= short:
            chosen.remove(model)
            total -= model.held_bytes
    return chosen


def described(models: Iterable[PooledModel], now: float) -> str:
    """Return the names of models and their use, for people."""
    return ", ".join(f"{each.name}, {_use(each, now)}" for each in models)


def when(models: Iterable[PooledModel], wait: float, stay: float) -> str:
    """Return when models that cannot go yet will go, for people.

    Args:
        models: The models.
        wait: Time until models in use yield, in seconds.
        stay: Time until the residence of all has passed, in seconds.
    """
    if wait <= 0:
        return "which get no new requests"
    if all(each.is_idle for each in models):
        return f"which may go in {min(stay, wait):.1f} s"
    return f"which yield in {wait:.0f} s"


def _use(model: PooledModel, now: float) -> str:
    if model.leases:
        return f"used by {model.leases}"
    return f"idle for {max(0.0, now - model.idle_since):.0f} s"


def over_budget(model: PooledModel, budget_bytes: int, rest_bytes: int) -> str:
    """Return the refusal of a model that the budget has no room for beside pinned models."""
    pinned = format_bytes(budget_bytes - rest_bytes)
    return (
        f"{model.name} needs {format_bytes(model.need.total_bytes)}, and the pool's budget is "
        f"{format_bytes(budget_bytes)}, of which pinned models hold {pinned}; raise the budget, "
        "unpin a model, or load with a smaller context_length or parallel"
    )


def over_machine(model: PooledModel, rest_bytes: int) -> str:
    """Return the refusal of a model that the machine has no room for."""
    return (
        f"{model.name} needs {format_bytes(model.need.required_bytes)}, and the machine could give "
        f"{format_bytes(rest_bytes)} if every other model of this pool that is not pinned went; "
        "free memory, or load with a smaller context_length or parallel"
    )


def needs_eviction(
    model: PooledModel, short_bytes: int, victims: Iterable[PooledModel], now: float
) -> str:
    """Return the refusal of a caller who asked for no eviction."""
    going = described(victims, now) or "more than the models that may go"
    return (
        f"{model.name} needs {format_bytes(model.need.total_bytes)}, {format_bytes(short_bytes)} "
        f"more than is free; would have to go: {going}. {_NO_EVICTION}"
    )


def kept_for_others(model: PooledModel) -> str:
    """Return the refusal of a caller who asked for no eviction, while others wait for memory."""
    return (
        f"{model.name} needs {format_bytes(model.need.total_bytes)}, and what is free is kept for "
        f"requests that came before. {_NO_EVICTION}"
    )
