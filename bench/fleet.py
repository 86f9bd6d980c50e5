"""Contenders on one model: all started, one running at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from bench.contenders import CONTENDERS, Contender, Setup
from bench.records import ContenderError
from bench.results import Case, Key, Results

logger = logging.getLogger(__name__)

_TURN_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One value measured in a turn of a contender."""

    metric: str
    case: Case
    value: float


Turn = Callable[[Contender, int], Awaitable[list[Sample]]]
"""Work of a contender in its turn. The second argument is the index of the round, ``WARM_UP`` for
the warm-up."""

WARM_UP = -1


class Fleet:
    """Contenders that take turns.

    All contenders except the running one are suspended with SIGSTOP, because some of them
    poll while idle.

    Args:
        model: Name of the model in the results.
        setup: Settings every contender is started with.
        names: Names of the contenders that take part.
        results: Receives values and failures.
    """

    def __init__(self, model: str, setup: Setup, names: Iterable[str], results: Results) -> None:
        self.model = model
        self.setup = setup
        self._members = {name: CONTENDERS[name](setup) for name in names}
        self._results = results

    async def start(self, measure: str) -> None:
        """Start every contender, dropping any that fails to start."""
        for name in list(self._members):
            await self._attempt(name, measure, self._start(name))

    async def stop(self) -> None:
        """Stop every contender."""
        for contender in self._members.values():
            await contender.stop()

    async def rounds(self, measure: str, turn: Turn, count: int, *, warm_up: bool = True) -> None:
        """Give every contender a turn in every round, rotating which one goes first.

        Args:
            measure: Name of the measure in the results.
            turn: Work to do; values from the warm-up are discarded.
            count: Number of rounds after the warm-up.
            warm_up: Run a warm-up round first.
        """
        for index in range(WARM_UP if warm_up else 0, count):
            names = list(self._members)
            shift = index % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                await self._attempt(name, measure, self._take_turn(name, measure, turn, index))

    async def _start(self, name: str) -> None:
        await self._members[name].start()
        await self._members[name].quiet()
        self._members[name].pause()

    async def _take_turn(self, name: str, measure: str, turn: Turn, index: int) -> None:
        contender = self._members[name]
        contender.resume()
        samples = await asyncio.wait_for(turn(contender, index), _TURN_SECONDS)
        await contender.quiet()
        contender.pause()
        if index != WARM_UP:
            for sample in samples:
                key = Key(measure, self.model, name, sample.metric, sample.case)
                self._results.add(key, sample.value)

    async def _attempt(self, name: str, measure: str, work: Awaitable[None]) -> None:
        """Await ``work``; on failure, record the error and drop the contender."""
        try:
            await work
        except (ContenderError, OSError, TimeoutError) as error:
            why = str(error) or f"not finished within {_TURN_SECONDS:.0f} s"
            logger.warning("%s, %s, %s: %s", measure, self.model, name, why)
            self._results.fail(name, f"{measure}, {self.model}", why)
            await self._members.pop(name).stop()
