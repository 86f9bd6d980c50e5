"""One run of the benchmark: its settings, its results, and the fleet of the moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.contenders import CONTENDERS, Setup
from bench.fleet import Fleet
from bench.models import context_length, ensure_model
from bench.prompts import Prompts
from bench.results import Results

MAX_CONTEXT = 8192


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        quick: The five-minute version.
        contenders: Who takes part.
        rounds: How often everything is measured.
    """

    quick: bool = False
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    rounds: int = 3


class Session:
    """What every measure is given.

    Args:
        settings: What the user asked for.
        results: Where the figures go.
    """

    def __init__(self, settings: Settings, results: Results) -> None:
        self.settings = settings
        self.results = results
        self._fleet: Fleet | None = None
        self._prompts: dict[str, Prompts] = {}

    def prompts(self, model: str) -> Prompts:
        """The prompts of a model; no two that it gives begin alike, in all of the session."""
        if model not in self._prompts:
            self._prompts[model] = Prompts(ensure_model(model))
        return self._prompts[model]

    async def fleet(self, model: str, measure: str, *, fresh: bool = False) -> Fleet:
        """The contenders with this model, started; the last ones go on if they have it.

        Args:
            model: The model's name.
            measure: What it is for.
            fresh: Start them anew in any case.
        """
        if self._fleet and self._fleet.model == model and not fresh:
            return self._fleet
        await self.close()
        self._fleet = Fleet(model, setup(model), self.settings.contenders, self.results)
        await self._fleet.start(measure)
        return self._fleet

    async def close(self) -> None:
        """Ends every process of the session."""
        if self._fleet:
            await self._fleet.stop()
            self._fleet = None

    def others(self, names: Iterable[str]) -> list[str]:
        """Those of the contenders that take part."""
        return [name for name in names if name in self.settings.contenders]


def setup(model: str, blas: str = "auto") -> Setup:
    """What a contender is started with for this model; the model is written if need be."""
    path = ensure_model(model)
    return Setup(path, min(MAX_CONTEXT, context_length(path)), blas)
