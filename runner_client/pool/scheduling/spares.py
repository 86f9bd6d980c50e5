"""Spare processes of a pool: how many, which one a load takes, and which ones go first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from runner_client.pool.scheduling.states import EndSpare, Spare, StartSpare

if TYPE_CHECKING:
    from collections.abc import Iterator

PAUSE_SECONDS = 10.0
"""How long no spare process is started after one was stopped for its memory, or found no room:
free memory that goes up and down must not start and stop one all the time."""


class Spares:
    """Spare processes, started or starting.

    A load takes one in any state, so that its memory is a part of the load's need: the *next* one.
    The others hold memory that nothing needs, and go before any model does.

    Args:
        most: Number of spare processes to keep.
        each_bytes: Memory counted for each.

    Attributes:
        each_bytes: As given.
    """

    def __init__(self, most: int, each_bytes: int) -> None:
        self._most = most
        self.each_bytes = each_bytes
        self._all: list[Spare] = []
        self._not_before = -math.inf

    @property
    def held_bytes(self) -> int:
        """Memory counted for all of them."""
        return sum(spare.held_bytes for spare in self._all)

    @property
    def next_bytes(self) -> int:
        """Memory of the one that the next load takes; 0 if there is none."""
        return sum(spare.held_bytes for spare in self._usable()[:1])

    @property
    def rest_bytes(self) -> int:
        """Memory of all others, which the next load gets if it needs it."""
        return self.held_bytes - self.next_bytes

    @property
    def ending_bytes(self) -> int:
        """Memory of those that are being stopped."""
        return sum(spare.held_bytes for spare in self._all if spare.is_ending)

    @property
    def ready_count(self) -> int:
        """Number of those that have started and that a load can take."""
        return sum(spare.is_ready for spare in self._usable())

    def start_time(self, *, only_next: bool) -> float:
        """Return the time from which one may be started; infinite if none is missing."""
        return self._not_before if self._missing(only_next) else math.inf

    def _missing(self, only_next: bool) -> int:
        missing = self._most - len(self._all)
        return min(missing, 0 if self._usable() else 1) if only_next else missing

    def take(self) -> Spare | None:
        """Take one for a load; it counts for the model from now on. None if there is none."""
        usable = self._usable()
        if not usable:
            return None
        self._all.remove(usable[0])
        return usable[0]

    def start(self, now: float, room_bytes: int, *, only_next: bool) -> Iterator[StartSpare]:
        """Start as many as are missing and fit the room, or pause if not even one does.

        Args:
            now: The time.
            room_bytes: Memory that they may take.
            only_next: Whether to start none but the one that the next load takes.
        """
        if room_bytes < self.each_bytes:
            self.pause_until(now + PAUSE_SECONDS)
            return
        for _ in range(min(self._missing(only_next), room_bytes // self.each_bytes)):
            spare = Spare(self.each_bytes)
            self._all.append(spare)
            yield StartSpare(spare)

    def make_room(self, now: float, short: int) -> Iterator[EndSpare]:
        """Stop those that the next load does not take, until ``short`` bytes will be free."""
        short -= self.ending_bytes
        for spare in reversed(self._usable()[1:]):
            if short <= 0:
                return
            short -= spare.held_bytes
            yield self._end(now, spare, "a load needs the memory")

    def end_one(self, now: float, reason: str) -> EndSpare | None:
        """Stop one; return None if there is none."""
        usable = self._usable()
        return self._end(now, usable[-1], reason) if usable else None

    def _end(self, now: float, spare: Spare, reason: str) -> EndSpare:
        spare.is_ending = True
        self.pause_until(now + PAUSE_SECONDS)
        return EndSpare(spare, reason)

    def gone(self, spare: Spare) -> None:
        """Report that one has failed to start, has died or was stopped."""
        if spare in self._all:
            self._all.remove(spare)

    def pause_until(self, time: float) -> None:
        """Start none before a time."""
        self._not_before = max(self._not_before, time)

    def _usable(self) -> list[Spare]:
        """Return those that a load can take, in this order: started before starting."""
        usable = [spare for spare in self._all if not spare.is_ending]
        return sorted(usable, key=lambda spare: not spare.is_ready)
