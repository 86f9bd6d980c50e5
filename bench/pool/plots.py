"""Plot of the schedulers: distribution of first-token times, and memory over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import plots, svg
from bench.pool.measures import MODEL, TRACE
from bench.results import Results

NAME = "pool.svg"
_COLORS = ("#2b6cb0", "#d6422b", "#b7791f")


def draw(results: Results, folder: Path) -> list[str]:
    """Draw the plot if the trace was measured, and return the file names."""
    names = results.contenders(TRACE, MODEL)
    if not names:
        return []
    svg.use()
    folder.mkdir(parents=True, exist_ok=True)
    figure, (waits, memory) = plots.new_panes(2)
    for name, color in zip(names, _COLORS, strict=False):
        _distribution(waits, results.values(TRACE, MODEL, name, "ttft_seconds", 1), name, color)
        seconds, sizes = (results.timelines[f"{name}, {unit}"] for unit in ("seconds", "MiB"))
        memory.plot(seconds, sizes, label=name, color=color, linewidth=1)
    waits.set(xscale="log", xlabel="seconds to the first token", ylabel="% of requests", ylim=0)
    memory.set(xlabel="seconds", ylabel="MiB of all processes", ylim=0)
    return [plots.save_plot(figure, [waits, memory], folder, NAME)]


def _distribution(pane: Any, values: list[float], name: str, color: str) -> None:
    shares = [100 * (index + 1) / len(values) for index in range(len(values))]
    pane.step(sorted(values), shares, where="post", label=name, color=color)
