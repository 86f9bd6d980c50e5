"""Plot of rate, queue, memory and latency over time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import svg
from soak.records import Sample
from soak.session import Run
from soak.stats import MIB, WARM_UP_SHARE

_PANE_INCHES = 2.2
_LATENCY = "Status, ms"

_PANES: dict[str, dict[str, Callable[[Sample], float]]] = {
    "tokens per second": {"": lambda sample: sample.tokens_per_second},
    "requests": {
        "running": lambda sample: sample.running,
        "queued": lambda sample: sample.queued,
    },
    "MiB": {
        "resident set": lambda sample: sample.rss_bytes / MIB,
        "MLX active": lambda sample: sample.active_bytes / MIB,
        "MLX cache": lambda sample: sample.cache_bytes / MIB,
        "prefix cache": lambda sample: sample.prefix_bytes / MIB,
    },
    _LATENCY: {"": lambda sample: sample.status_seconds * 1000},
    "of the process": {
        "threads": lambda sample: sample.threads,
        "descriptors": lambda sample: sample.descriptors,
    },
}
"""Lines of each pane, by the unit of the pane."""


def can_draw() -> bool:
    """Return whether matplotlib is installed (the bench group)."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(run: Run, path: Path) -> None:
    """Plot the samples of a run."""
    from matplotlib import pyplot as plt

    svg.use()
    size = (svg.WIDTH_INCHES, _PANE_INCHES * len(_PANES))
    figure, panes = plt.subplots(len(_PANES), 1, figsize=size, sharex=True)
    minutes = [sample.seconds / 60 for sample in run.samples]
    for pane, (unit, lines) in zip(panes, _PANES.items(), strict=True):
        series = {name: [value(sample) for sample in run.samples] for name, value in lines.items()}
        lines_of(pane, minutes, unit, series, is_log=unit == _LATENCY)
    for pane in panes:
        pane.axvspan(0, WARM_UP_SHARE * run.settings.seconds / 60, color=svg.INK, alpha=0.08)
    panes[0].set(title="one runner at twice its capacity\ngrey: warm-up, not judged")
    panes[-1].set(xlabel="minutes")
    figure.tight_layout()
    svg.save(figure, path)
    plt.close(figure)


def lines_of(
    pane: Any,
    minutes: list[float],
    unit: str,
    series: dict[str, list[float]],
    *,
    is_log: bool = False,
) -> None:
    """Draw the lines of a pane over the minutes of a run."""
    for name, values in series.items():
        pane.plot(minutes, values, label=name, linewidth=1)
    pane.set(ylabel=unit)
    if is_log:
        pane.set(yscale="log")
    else:
        pane.set(ylim=(0, None))
    pane.grid()
    if len(series) > 1:
        # Above the pane, clear of the lines.
        legend_position = {"loc": "lower right", "bbox_to_anchor": (1, 0.96)}
        pane.legend(frameon=False, ncols=2, **legend_position)
