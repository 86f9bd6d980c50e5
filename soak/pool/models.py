"""Models of the pools under load, their needs and the budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.models import POOLED_SHAPES, ensure_model
from runner_client import LoadOptions
from runner_client.memory.estimation import estimate

RESIDENT = 2
"""Number of models for which the budget is enough, even for the largest ones."""

OPTIONS = LoadOptions(context_length=512, parallel=4, prefix_cache_bytes=4 * 2**20)

VOCABULARY = min(shape.vocab_size for shape in POOLED_SHAPES.values())


@dataclass(frozen=True)
class Models:
    """Models by name.

    Attributes:
        paths: Directory of each model.
        needs: Estimated need of each model, in bytes.
    """

    paths: dict[str, Path]
    needs: dict[str, int]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(self.paths)

    def largest(self, count: int) -> int:
        """Return the need of the ``count`` largest models together, in bytes."""
        return sum(sorted(self.needs.values())[-count:])

    def name_of(self, path: str) -> str:
        """Return the name of the model in a directory."""
        return next(name for name, each in self.paths.items() if str(each) == path)


def prepare() -> Models:
    """Write the models into the benchmark's cache, if needed, and estimate them."""
    paths = {name: ensure_model(name).resolve() for name in POOLED_SHAPES}
    needs = {name: estimate(str(path), options=OPTIONS) for name, path in paths.items()}
    return Models(paths, {name: need.total_bytes for name, need in needs.items()})
