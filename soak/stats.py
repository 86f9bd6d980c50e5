"""Statistics of a soak: slopes, warm-up and growth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from soak.records import Sample

WARM_UP_SHARE = 0.25
"""Share of a run that is warm-up and not checked."""

MIB = 2**20
SECONDS_PER_HOUR = 3600.0


class Timed(Protocol):
    """A sample with the time since the start of the load."""

    @property
    def seconds(self) -> float:
        """Time since the start of the load."""


T = TypeVar("T", bound=Timed)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the points.

    Source: the normal equations, sum((x - mean x)(y - mean y)) / sum((x - mean x)^2).

    Raises:
        ValueError: Fewer than two distinct xs, or lengths that differ.
    """
    if len(xs) != len(ys) or len(set(xs)) < 2:
        raise ValueError("a slope needs two points")
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def warm(samples: Sequence[T], seconds: float) -> list[T]:
    """Return the samples taken after the warm-up of a run of ``seconds``."""
    return [sample for sample in samples if sample.seconds >= WARM_UP_SHARE * seconds]


def rss_slope(samples: Sequence[Sample]) -> float:
    """Return the growth of the resident set in MiB per hour."""
    return _hourly(samples, lambda sample: sample.rss_bytes)


def own_slope(samples: Sequence[Sample]) -> float:
    """Return the growth of the resident set without MLX's buffer cache, in MiB per hour.

    The buffer cache grows ever more slowly toward its own limit, for longer than any soak.
    """
    return _hourly(samples, lambda sample: sample.rss_bytes - sample.cache_bytes)


def _hourly(samples: Sequence[Sample], size: Callable[[Sample], int]) -> float:
    times = [sample.seconds for sample in samples]
    return slope(times, [size(sample) / MIB for sample in samples]) * SECONDS_PER_HOUR


def growth(values: Sequence[int]) -> float:
    """Return the median of the last third minus the median of the first third.

    Raises:
        ValueError: Fewer than three values.
    """
    if len(values) < 3:
        raise ValueError("growth needs three values")
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[:third])
