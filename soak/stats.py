"""The arithmetic of the soak: slopes, what counts as warm, and what is flat."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from soak.records import Sample

WARM_UP_SHARE = 0.25
"""Of a run: what happens before is not judged."""

MIB = 2**20
SECONDS_PER_HOUR = 3600.0


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of the line with the least squares through the points, in y for each x.

    Source: the normal equations, sum((x - mean x)(y - mean y)) / sum((x - mean x)^2).

    Raises:
        ValueError: There are fewer than two different xs.
    """
    if len(xs) != len(ys) or len(set(xs)) < 2:
        raise ValueError("a slope needs two points")
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def warm(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """The samples after the warm-up of a run of so many seconds."""
    return [sample for sample in samples if sample.seconds >= WARM_UP_SHARE * seconds]


def rss_slope(samples: Sequence[Sample]) -> float:
    """How fast the resident set grows, in MiB per hour."""
    return _hourly(samples, lambda sample: sample.rss_bytes)


def own_slope(samples: Sequence[Sample]) -> float:
    """The same without what MLX keeps for reuse, in MiB per hour.

    That fills more and more slowly, for longer than any soak, up to a limit of its own.
    """
    return _hourly(samples, lambda sample: sample.rss_bytes - sample.cache_bytes)


def _hourly(samples: Sequence[Sample], size: Callable[[Sample], int]) -> float:
    times = [sample.seconds for sample in samples]
    return slope(times, [size(sample) / MIB for sample in samples]) * SECONDS_PER_HOUR


def growth(values: Sequence[int]) -> float:
    """How much the median of the last third is above that of the first third.

    Raises:
        ValueError: There are fewer than three values.
    """
    if len(values) < 3:
        raise ValueError("growth needs three values")
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[:third])
