"""Memory need of a model in a pool, and the options of the load."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runner_client.errors import ModelNotFoundError
from runner_client.memory.estimation import estimate
from runner_client.memory.model import find_model
from runner_client.pool.scheduling.states import Need

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.pool.scheduling.settings import ModelSettings, PoolSettings
    from runner_client.types import LoadOptions


@dataclass(frozen=True, slots=True)
class Appraisal:
    """A model's need, and the options with which it is loaded.

    Attributes:
        settings: The settings of the model.
        estimate: The estimate of the load.
        options: The options of the load, with the number format and prefix cache settled.
    """

    settings: ModelSettings
    estimate: MemoryEstimate
    options: LoadOptions

    @property
    def need(self) -> Need:
        """The bytes that the scheduler counts."""
        return Need(self.estimate.total_bytes, self.estimate.required_bytes)


def appraise(
    model: str,
    pool: PoolSettings,
    machine_bytes: Callable[[], int],
    budget_bytes: int | None,
    environ: Mapping[str, str],
    blas: str = "auto",
) -> Appraisal:
    """Estimate a model for a pool. Blocks: reads files, and may start a short-lived process.

    ``"auto_or_stored"`` falls back to the stored format only if the model could never fit
    otherwise, whatever was evicted. A prefix cache of the default size takes what the budget leaves
    if it exceeds the budget, or half of what the machine leaves if that is less than the budget.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        pool: The settings of the pool.
        machine_bytes: Returns the memory that the model could have if all others went that may go.
        budget_bytes: The same for the budget; None if only the machine limits the pool.
        environ: The environment of the runner.
        blas: As for ``AsyncRunnerProcess``.

    Raises:
        RunnerError: As for ``estimate``.
    """
    settings = _settings_of(model, pool, environ)
    options = settings.options
    found = estimate(model, options=options, env=environ, blas=blas)
    if options.dtype == "auto_or_stored":
        options = replace(options, dtype="auto")
        capacity = machine_bytes()
        if budget_bytes is not None:
            capacity = min(capacity, budget_bytes)
        if found.dtype != "as_stored" and found.required_bytes > capacity:
            options = replace(options, dtype="as_stored")
            found = estimate(model, options=options, env=environ, blas=blas)
    if budget_bytes is not None and found.required_bytes <= budget_bytes < found.total_bytes:
        rest = budget_bytes - found.required_bytes
        # The machine's memory changes until the load.
        rest = min(rest, max(0, machine_bytes() - found.required_bytes) // 2)
        options = replace(options, prefix_cache_bytes=rest)
        found = estimate(model, options=options, env=environ, blas=blas)
    return Appraisal(settings, found, options)


def _settings_of(model: str, pool: PoolSettings, environ: Mapping[str, str]) -> ModelSettings:
    """Return the settings of a model, which may be listed under another of its names."""
    if model not in pool.models:
        path = find_model(model, environ).path
        for name, settings in pool.models.items():
            with contextlib.suppress(ModelNotFoundError):
                if find_model(name, environ).path == path:
                    return settings
    return pool.of(model)
