"""Plot of the memory of each model over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import svg
from soak.plots import lines_of
from soak.pool.records import STOPPING, UNKNOWN, Phase, PoolRun
from soak.pool.report import thinned
from soak.stats import MIB

_PANE_INCHES = 2.6
_COLORS = ("#2b6cb0", "#d6422b", "#2f8f4e", "#b7791f", "#6b46c1", "#888888", "#cccccc")


def draw(run: PoolRun, path: Path) -> None:
    """Plot the memory in each phase, and the descriptors and threads of the first one."""
    from matplotlib import pyplot as plt

    svg.use()
    count = len(run.phases) + 1
    size = (svg.WIDTH_INCHES, _PANE_INCHES * count)
    figure, panes = plt.subplots(count, 1, figsize=size)
    for pane, phase in zip(panes, run.phases, strict=False):
        _memory(pane, phase)
    samples = thinned(run.phases[0].samples)
    counts: dict[str, list[float]] = {
        "threads": [sample.threads for sample in samples],
        "descriptors": [sample.descriptors for sample in samples],
    }
    minutes = [sample.seconds / 60 for sample in samples]
    lines_of(panes[-1], minutes, f"of the process, {run.phases[0].name}", counts)
    panes[-1].set(xlabel="minutes", xlim=(0, None))
    figure.tight_layout()
    svg.save(figure, path)
    plt.close(figure)


def _memory(pane: Any, phase: Phase) -> None:
    """Stack the resident sets of the models, below the line of the limit."""
    samples = thinned(phase.samples)
    minutes = [sample.seconds / 60 for sample in samples]
    sizes = [sample.by_model() for sample in samples]
    names = [
        name for name in (*phase.needs, STOPPING, UNKNOWN) if any(size[name] for size in sizes)
    ]
    layers = [[size[name] / MIB for size in sizes] for name in names]
    pane.stackplot(minutes, layers, labels=names, colors=_COLORS, step="post", linewidth=0)
    pane.axhline(phase.limit_bytes / MIB, color=svg.INK, linewidth=1, linestyle="--")
    pane.set(title=f"{phase.name}\ndashed: the limit", ylabel="MiB", ylim=(0, None))
    pane.set(xlim=(0, None))
    pane.grid()
    pane.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
