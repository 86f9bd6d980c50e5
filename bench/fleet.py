"""The contenders of one model, all started, one of them running at a time."""

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
    """One value that a turn of a contender brought."""

    metric: str
    case: Case
    value: float


Turn = Callable[[Contender, int], Awaitable[list[Sample]]]
"""What a contender does in its turn. The second argument is the number of the round; the
warm-up is ``WARM_UP``."""

WARM_UP = -1


class Fleet:
    """Contenders that take turns.

    All but the one whose turn it is are stopped in their tracks (SIGSTOP), because
    some of them poll when they are idle.

    Args:
        model: The model's name, for the results.
        setup: What each is started with.
        names: Who takes part.
        results: Where values and failures go.
    """

    def __init__(self, model: str, setup: Setup, names: Iterable[str], results: Results) -> None:
        self.model = model
        self.setup = setup
        self._members = {name: CONTENDERS[name](setup) for name in names}
        self._results = results

    async def start(self, measure: str) -> None:
        """Starts all; who cannot be started takes no part."""
        for name in list(self._members):
            await self._attempt(name, measure, self._start(name))

    async def stop(self) -> None:
        """Ends all of them."""
        for contender in self._members.values():
            await contender.stop()

    async def rounds(self, measure: str, turn: Turn, count: int, *, warm_up: bool = True) -> None:
        """Gives every contender a turn in every round, each round beginning with another one.

        Args:
            measure: The name for the results.
            turn: What is done; the values of the warm-up are dropped.
            count: How many rounds after the warm-up.
            warm_up: Whether to make one.
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
        """Does it; a contender that fails is noted and takes no further part."""
        try:
            await work
        except (ContenderError, OSError, TimeoutError) as error:
            why = str(error) or f"no end within {_TURN_SECONDS:.0f} s"
            logger.warning("%s, %s, %s: %s", measure, self.model, name, why)
            self._results.fail(name, f"{measure}, {self.model}", why)
            await self._members.pop(name).stop()
