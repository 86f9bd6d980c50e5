"""Random histories of a pool on a simulated machine; the promises are checked at every event."""

from __future__ import annotations

from collections import Counter

import pytest

from support.pool_simulation import Scenario, Simulation
from support.sweeps import diagonal

SEEDS = range(15)


def run(scenario: Scenario) -> tuple[Counter[str], list[Simulation]]:
    simulations = [Simulation(scenario, seed) for seed in SEEDS]
    total: Counter[str] = Counter()
    for simulation in simulations:
        total += simulation.run()
    return total, simulations


@pytest.mark.parametrize(
    ("spares", "budget", "rate"), diagonal([0, 2], [100, None], [0.2, 1.0, 5.0])
)
def test_promises_hold_through_deaths_pressure_and_pins(
    rate: float, budget: int | None, spares: int
) -> None:
    counts, _ = run(Scenario(arrivals_per_second=rate, budget=budget, spares=spares))
    names = ("granted", "refused", "cancelled", "failed", "death", "pressure", "pin", "eviction")
    for name in (*names, "manual eviction", "eviction to make room", "refused for good"):
        assert counts[name] > 0, (name, counts)
    for name in ("spare start", "spare taken", "spare lost", "spare stopped"):
        assert (counts[name] > 0) == (spares > 0), (name, counts)
    ends = ("granted", "refused", "cancelled", "failed")
    assert counts["request"] == sum(counts[name] for name in ends)


@pytest.mark.parametrize(("spares", "rate"), diagonal([0, 2], [0.2, 1.0, 5.0]))
def test_no_request_waits_beyond_the_bound(rate: float, spares: int) -> None:
    counts, simulations = run(Scenario(arrivals_per_second=rate, is_calm=True, spares=spares))
    assert counts["eviction to make room"] > len(SEEDS)
    assert max(each.longest_wait for each in simulations) > 10.0
