"""A benchmark run: settings, results, and the current fleet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.contenders import CONTENDERS, Setup
from bench.contenders.base import PARALLEL
from bench.fleet import Fleet
from bench.models import FEW_STREAMS, context_length, ensure_model
from bench.prompts import Prompts
from bench.results import Results

MAX_CONTEXT = 8192


@dataclass(frozen=True)
class Settings:
    """Settings from the command line.

    Attributes:
        quick: Run the five-minute version.
        contenders: Names of the contenders that take part.
        rounds: Number of times each value is measured.
    """

    quick: bool = False
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    rounds: int = 3


class Session:
    """Context passed to every measure.

    Args:
        settings: Settings from the command line.
        results: Receives the figures.
    """

    def __init__(self, settings: Settings, results: Results) -> None:
        self.settings = settings
        self.results = results
        self._fleet: Fleet | None = None
        self._prompts: dict[str, Prompts] = {}

    def prompts(self, model: str) -> Prompts:
        """Return the prompt generator of a model, one per session so that no prompts collide."""
        if model not in self._prompts:
            self._prompts[model] = Prompts(ensure_model(model))
        return self._prompts[model]

    async def fleet(self, model: str, measure: str, *, fresh: bool = False) -> Fleet:
        """Return started contenders with this model, reusing the current fleet if possible.

        Args:
            model: Name of the model.
            measure: Name of the measure, for failures.
            fresh: Restart the contenders even if the current fleet has the model.
        """
        if self._fleet and self._fleet.model == model and not fresh:
            return self._fleet
        await self.close()
        self._fleet = Fleet(model, setup(model), self.settings.contenders, self.results)
        await self._fleet.start(measure)
        return self._fleet

    async def close(self) -> None:
        """Stop every process of the session."""
        if self._fleet:
            await self._fleet.stop()
            self._fleet = None

    def others(self, names: Iterable[str]) -> list[str]:
        """Return the given contenders that take part in this run."""
        return [name for name in names if name in self.settings.contenders]


def setup(model: str, blas: str = "auto") -> Setup:
    """Return the setup of a contender for this model, writing the model first if needed."""
    path = ensure_model(model)
    parallel = FEW_STREAMS.get(model, PARALLEL)
    return Setup(path, min(MAX_CONTEXT, context_length(path)), blas, parallel)
