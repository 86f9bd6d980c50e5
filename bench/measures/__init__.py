"""Measures of the benchmark, in execution order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from bench.measures import (
    agreement,
    arrival,
    constrained,
    drafts,
    growth,
    http,
    limits,
    memory,
    open_loop,
    prefix,
    profile,
    quantized,
    start,
    throughput,
)
from bench.models import DEMO
from bench.session import Session

__all__ = ["MEASURES", "Measure"]


@dataclass(frozen=True)
class Measure:
    """A measure of the benchmark.

    Attributes:
        run: Takes the measure.
        quick: Whether the five-minute version includes it.
    """

    run: Callable[[Session], Awaitable[None]]
    quick: bool = False


# Consecutive measures share a model, so that its contenders start only once.
MEASURES = {
    "start": Measure(start.measure, quick=True),
    "agreement": Measure(agreement.measure, quick=True),
    **{
        f"throughput-{model}": Measure(partial(throughput.measure, plan=plan), quick=model == DEMO)
        for model, plan in throughput.PLANS.items()
    },
    "limits": Measure(limits.measure),
    "profile": Measure(profile.measure),
    "prefix": Measure(prefix.measure, quick=True),
    "arrival": Measure(arrival.measure_gap, quick=True),
    "health": Measure(arrival.measure_health, quick=True),
    "prompt-length": Measure(growth.measure_prompt_length),
    "cache-entries": Measure(growth.measure_cache_entries),
    "open-loop": Measure(open_loop.measure),
    "long-prompts": Measure(growth.measure_long_prompts),
    "memory": Measure(memory.measure),
    "quantized": Measure(quantized.measure),
    "http": Measure(http.measure),
    "constrained": Measure(constrained.measure),
    "drafts": Measure(drafts.measure),
    "draft-model": Measure(drafts.measure_draft_model),
}
