"""Rate, queue, memory and latency over time, one picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from soak.session import Run
from soak.stats import MIB, WARM_UP_SHARE

_DPI = 110


def can_draw() -> bool:
    """Whether matplotlib is installed (the bench group)."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(run: Run, path: Path) -> None:
    """Draws the samples of a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(5, 1, figsize=(9, 11), sharex=True)
    minutes = [sample.seconds / 60 for sample in run.samples]
    _lines(
        panes[0],
        minutes,
        "tokens per second",
        {
            "": [sample.tokens_per_second for sample in run.samples],
        },
    )
    _lines(
        panes[1],
        minutes,
        "requests",
        {
            "running": [sample.running for sample in run.samples],
            "queued": [sample.queued for sample in run.samples],
        },
    )
    _lines(
        panes[2],
        minutes,
        "MiB",
        {
            "resident set": [sample.rss_bytes / MIB for sample in run.samples],
            "MLX active": [sample.active_bytes / MIB for sample in run.samples],
            "MLX cache": [sample.cache_bytes / MIB for sample in run.samples],
            "prefix cache": [sample.prefix_bytes / MIB for sample in run.samples],
        },
    )
    _lines(
        panes[3],
        minutes,
        "Status, ms",
        {
            "": [sample.status_seconds * 1000 for sample in run.samples],
        },
        is_log=True,
    )
    _lines(
        panes[4],
        minutes,
        "of the process",
        {
            "threads": [sample.threads for sample in run.samples],
            "descriptors": [sample.descriptors for sample in run.samples],
        },
    )
    for pane in panes:
        pane.axvspan(0, WARM_UP_SHARE * run.settings.seconds / 60, color="black", alpha=0.05)
    panes[0].set(title="one runner at twice its capacity; grey: warm-up, not judged")
    panes[-1].set(xlabel="minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _lines(
    pane: Any,
    minutes: list[float],
    unit: str,
    series: dict[str, list[float]],
    *,
    is_log: bool = False,
) -> None:
    for name, values in series.items():
        pane.plot(minutes, values, label=name, linewidth=1)
    pane.set(ylabel=unit)
    if is_log:
        pane.set(yscale="log")
    else:
        pane.set(ylim=(0, None))
    pane.grid(alpha=0.3)
    if len(series) > 1:
        pane.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(series))
