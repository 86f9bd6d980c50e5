"""Plots of a benchmark run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.measures import arrival, growth, prefix
from bench.results import Case, Results

_COLORS = {"direct": "#888888", "ours": "#d6422b", "mlx-lm server": "#2b6cb0", "SMG": "#2f8f4e"}
_MARKERS = {"direct": "s", "ours": "o", "mlx-lm server": "^", "SMG": "D"}
_DPI = 110


def draw(results: Results, folder: Path) -> list[str]:
    """Draw a plot of every measure that has results and return the file names."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        *(_throughput(results, model, folder) for model in results.models("greedy")),
        _timeline(results, folder),
        _prompt_length(results, folder),
        _prefix(results, folder),
        _cache_entries(results, folder),
    ]
    return [name for name in drawn if name]


def _throughput(results: Results, model: str, folder: Path) -> str:
    """Plot tokens per second by number of streams, greedy and sampled."""
    figure, panes = _panes(2)
    for pane, measure in zip(panes, ("greedy", "sampled"), strict=True):
        _lines(pane, results, measure, model, "rate")
        pane.set(title=f"{model}, {measure}", xlabel="streams", ylabel="tokens per second", ylim=0)
    return _save(figure, panes, folder, f"throughput-{model}.png")


def _timeline(results: Results, folder: Path) -> str:
    """Plot each message of the running stream as a tick, so that a gap shows a stall."""
    if not results.timelines:
        return ""
    figure, (pane,) = _panes(1, width=9)
    names = [name for name in _COLORS if name in results.timelines][::-1]
    for row, name in enumerate(names):
        times = results.timelines[name]
        pane.plot(times, [row] * len(times), "|", color=_COLORS[name], markersize=18)
        first = results.values("arrival", arrival.MODEL, name, "ttft_seconds", arrival.LONG_TOKENS)
        if first:
            pane.plot(first[-1], row + 0.36, "v", color="black", markersize=6)
    pane.axvline(0, color="black", linewidth=1)
    pane.set(
        title=f"A {arrival.LONG_TOKENS:,}-token prompt arrives at 0; triangle: its first token",
        xlabel="seconds; each tick is a message of the running stream",
        yticks=range(len(names)),
        yticklabels=names,
        xlim=(-0.5, None),
        ylim=(-0.6, len(names) - 0.4),
    )
    return _save(figure, [], folder, "arrival.png")


def _prompt_length(results: Results, folder: Path) -> str:
    figure, (pane,) = _panes(1)
    _lines(pane, results, "prompt-length", growth.MODEL, "ttft_seconds")
    pane.set(
        title=f"{growth.MODEL}, a single prompt",
        xlabel="prompt tokens",
        ylabel="seconds to the first token",
        xscale="log",
        yscale="log",
    )
    pane.set_xticks(growth.LENGTHS, labels=[f"{length:,}" for length in growth.LENGTHS])
    pane.minorticks_off()
    return _save(figure, [pane], folder, "prompt-length.png")


def _prefix(results: Results, folder: Path) -> str:
    """Plot time to first token of new and of shared prompts as bar pairs per contender."""
    names = results.contenders("prefix", prefix.MODEL)
    figure, (pane,) = _panes(1)
    for shift, case in ((-0.2, "first"), (0.2, "shared")):
        series = [
            results.values("prefix", prefix.MODEL, name, "ttft_seconds", case) for name in names
        ]
        heights = [statistics.median(values) * 1000 if values else 0.0 for values in series]
        positions = [position + shift for position in range(len(names))]
        bars = pane.bar(
            positions, heights, 0.4, color="#bbbbbb" if shift < 0 else "#d6422b", label=case
        )
        pane.bar_label(bars, fmt="%.0f")
    pane.set(
        title=f"{prefix.PROMPT_TOKENS:,}-token prompt; "
        f"shared: all but {prefix.FRESH_TOKENS} tokens seen",
        xticks=range(len(names)),
        xticklabels=names,
        ylabel="milliseconds to the first token",
    )
    pane.margins(y=0.25)
    return _save(figure, [pane], folder, "prefix.png") if names else _drop(figure)


def _cache_entries(results: Results, folder: Path) -> str:
    figure, panes = _panes(2)
    words = {"unrelated": "an unrelated prompt", "hit": "a prompt with a cached prefix"}
    for pane, (kind, title) in zip(panes, words.items(), strict=True):
        _lines(pane, results, "cache-entries", growth.MODEL, f"{kind}_ttft_seconds")
        pane.set(title=title, xlabel="earlier prompts", ylabel="seconds to first token", ylim=0)
    return _save(figure, panes, folder, "cache-entries.png")


def _lines(pane: Any, results: Results, measure: str, model: str, metric: str) -> None:
    """Plot the medians as one line per contender, with the spread as a band."""
    for name in results.contenders(measure, model):
        points: list[tuple[Case, list[float]]] = [
            (case, values)
            for case in results.cases(measure, model, metric)
            if (values := results.values(measure, model, name, metric, case))
        ]
        if not points:
            continue
        cases = [case for case, _ in points]
        medians = [statistics.median(values) for _, values in points]
        style = {"color": _COLORS[name], "marker": _MARKERS[name]}
        pane.plot(cases, medians, label=name, **style)
        pane.set_xticks(cases)
        lows, highs = ([edge(values) for _, values in points] for edge in (min, max))
        pane.fill_between(cases, lows, highs, color=_COLORS[name], alpha=0.15, linewidth=0)


def _panes(count: int, width: float = 5.0) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(1, count, figsize=(width * count, 3.8), squeeze=False)
    return figure, list(panes[0])


def _save(figure: Any, with_legend: list[Any], folder: Path, name: str) -> str:
    """Save the plot and return its file name, or an empty string if no pane has data."""
    if with_legend and not any(pane.has_data() for pane in with_legend):
        return _drop(figure)
    for pane in with_legend:
        pane.grid(alpha=0.3)
        if pane.has_data():
            pane.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / name, dpi=_DPI)
    _drop(figure)
    return name


def _drop(figure: Any) -> str:
    from matplotlib import pyplot as plt

    plt.close(figure)
    return ""
