"""Spare processes on the machine of ``pool_simulation``: starts, loads, deaths and stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from runner_client.pool.scheduling.states import EndSpare, PooledModel, Spare

if TYPE_CHECKING:
    from support.pool_simulation import Simulation

_START_SECONDS = 1.0
_RETURN_SECONDS = 1.0


class SimulatedSpares:
    """Spare processes and their reservations.

    Attributes:
        reserve: Memory that a spare process must leave free.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._begun: set[Spare] = set()
        self._reserved: dict[Spare, int] = {}
        self._taken: dict[str, Spare] = {}
        self.reserve = simulation.random.choice([0, 20]) if simulation.scenario.spares else 0

    @property
    def reserved_bytes(self) -> int:
        """Memory reserved for all of them, also for those that loads have just taken."""
        return sum(self._reserved.values())

    @property
    def begun_bytes(self) -> int:
        """Memory of those that the machine has not admitted yet."""
        return sum(spare.held_bytes for spare in self._begun)

    @property
    def untaken_bytes(self) -> int:
        """Memory of all but those that loads have just taken."""
        taken = sum(self._reserved.get(spare, 0) for spare in self._taken.values())
        return self.reserved_bytes - taken + self.begun_bytes

    def start(self, spare: Spare) -> None:
        """Carry out a ``StartSpare``."""
        self._simulation.counts["spare start"] += 1
        self._begun.add(spare)
        self._after(_START_SECONDS, lambda: self._admit(spare))

    def _admit(self, spare: Spare) -> None:
        if spare not in self._begun:
            return
        if spare.held_bytes > self._simulation.unreserved() or self._is_unlucky():
            self._lose(spare)
            return
        self._begun.remove(spare)
        self._reserved[spare] = spare.held_bytes
        self._after(_START_SECONDS, lambda: self._note_ready(spare))

    def _note_ready(self, spare: Spare) -> None:
        spare.is_ready = True

    def _is_unlucky(self) -> bool:
        return not self._simulation.scenario.is_calm and self._simulation.random.random() < 0.05

    def _lose(self, spare: Spare) -> None:
        """Report a death or a failed start."""
        simulation = self._simulation
        simulation.counts["spare lost"] += 1
        self._begun.discard(spare)
        self._reserved.pop(spare, None)
        simulation.scheduler.spares.gone(spare)
        simulation.scheduler.spares.pause_until(simulation.now + simulation.random.choice([0, 30]))

    def take(self, model: PooledModel, spare: Spare) -> None:
        """Carry out a ``Load`` in a spare process."""
        self._simulation.counts["spare taken"] += 1
        self._begun.discard(spare)
        self._taken[model.name] = spare

    def taken_bytes(self, model: PooledModel) -> int:
        """Return the memory reserved for the process of a load before the admission."""
        spare = self._taken.get(model.name)
        return 0 if spare is None else self._reserved.get(spare, 0)

    def give_back(self, model: PooledModel) -> None:
        """End the reservation of the process of a load, unless ended before."""
        if (spare := self._taken.pop(model.name, None)) is not None:
            self._reserved.pop(spare, None)

    def stop(self, spare: Spare) -> None:
        """Carry out an ``EndSpare``."""
        self._simulation.counts["spare stopped"] += 1

        def gone() -> None:
            self._begun.discard(spare)
            self._reserved.pop(spare, None)
            self._simulation.scheduler.spares.gone(spare)

        self._after(_RETURN_SECONDS, gone)

    def die(self) -> None:
        """Let an unused spare process die."""
        alive = [spare for spare in self._reserved if spare not in self._taken.values()]
        if alive:
            self._lose(self._simulation.random.choice(alive))

    def drop(self) -> None:
        """Stop one, as under outside pressure."""
        match self._simulation.scheduler.spares.end_one(self._simulation.now, "pressure"):
            case EndSpare(spare, _):
                self.stop(spare)

    def _after(self, most_seconds: float, event: Callable[[], None]) -> None:
        self._simulation.after(self._simulation.random.uniform(0.0, most_seconds), event)
