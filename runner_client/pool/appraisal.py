"""Memory need of a model in a pool, and the options of the load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runner_client.memory.estimation import estimate
from runner_client.pool.scheduling.states import Need

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.types import LoadOptions


@dataclass(frozen=True, slots=True)
class Appraisal:
    """A model's need, and the options with which it is loaded.

    Attributes:
        estimate: The estimate of the load.
        options: The options of the load, with the number format and prefix cache settled.
    """

    estimate: MemoryEstimate
    options: LoadOptions

    @property
    def need(self) -> Need:
        """The bytes that the scheduler counts."""
        return Need(self.estimate.total_bytes, self.estimate.required_bytes)


def appraise(
    model: str,
    options: LoadOptions,
    capacity_bytes: Callable[[], int],
    budget_bytes: int | None,
    environ: Mapping[str, str],
) -> Appraisal:
    """Estimate a model for a pool. Blocks: reads files, and may start a short-lived process.

    ``"auto_or_stored"`` falls back to the stored format only if the model could never fit
    otherwise, whatever was evicted. A prefix cache of the default size takes what the budget leaves
    if it exceeds the budget.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        options: The options as set for the model.
        capacity_bytes: Returns the memory that one model could have if all others went.
        budget_bytes: The budget of the pool; None if only the machine limits it.
        environ: The environment of the runner.

    Raises:
        RunnerError: As for ``estimate``.
    """
    found = estimate(model, options=options, env=environ)
    if options.dtype == "auto_or_stored":
        options = replace(options, dtype="auto")
        if found.dtype != "as_stored" and found.required_bytes > capacity_bytes():
            options = replace(options, dtype="as_stored")
            found = estimate(model, options=options, env=environ)
    if budget_bytes is not None and found.required_bytes <= budget_bytes < found.total_bytes:
        options = replace(options, prefix_cache_bytes=budget_bytes - found.required_bytes)
        found = estimate(model, options=options, env=environ)
    return Appraisal(found, options)
