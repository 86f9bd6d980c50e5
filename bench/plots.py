"""Plots of a benchmark run."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from bench import svg
from bench.contenders import OURS
from bench.measures import arrival, growth, limits, prefix
from bench.models import LONG
from bench.results import Case, Results

_COLORS = {"direct": "#888888", "ours": "#d6422b", "mlx-lm server": "#2b6cb0", "SMG": "#2f8f4e"}
_MARKERS = {"direct": "s", "ours": "o", "mlx-lm server": "^", "SMG": "D"}
_PANE_INCHES = 3.2


def draw(results: Results, folder: Path) -> list[str]:
    """Draw a plot of every measure that has results and return the file names."""
    svg.use()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        *(_throughput(results, model, folder) for model in results.models("greedy")),
        _limits(results, folder),
        _timeline(results, folder),
        _prompt_length(results, folder),
        _prefix(results, folder),
        _cache_entries(results, folder),
    ]
    return [name for name in drawn if name]


def _throughput(results: Results, model: str, folder: Path) -> str:
    """Plot tokens per second by number of streams, greedy and sampled."""
    figure, panes = new_panes(2)
    for pane, measure in zip(panes, ("greedy", "sampled"), strict=True):
        _lines(pane, results, measure, model, "rate")
        pane.set(title=f"{model}, {measure}", xlabel="streams", ylabel="tokens per second", ylim=0)
    return save_plot(figure, panes, folder, f"throughput-{model}.svg")


def _limits(results: Results, folder: Path) -> str:
    """Plot decoding with one stream by the size of the model, beside the machine's limit."""
    figure, (pane,) = new_panes(1)
    looks = {limits.MACHINE: "#888888", OURS: _COLORS[OURS]}
    for name, color in looks.items():
        points = sorted(
            (bytes_[0] / 2**20, statistics.median(rates))
            for model in results.models(limits.MEASURE)
            if (bytes_ := _of_limits(results, model, limits.MACHINE, "weight_bytes"))
            and (rates := _of_limits(results, model, name, "decode_rate"))
        )
        if points:
            label = "limit of the machine" if name == limits.MACHINE else name
            pane.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
    pane.set(
        title="decoding with one stream",
        xlabel="MiB of weights",
        ylabel="tokens per second",
        xscale="log",
        yscale="log",
    )
    return save_plot(figure, [pane], folder, "limits.svg")


def _of_limits(results: Results, model: str, contender: str, metric: str) -> list[float]:
    return results.values(limits.MEASURE, model, contender, metric, 1)


def _timeline(results: Results, folder: Path) -> str:
    """Plot each message of the running stream as a tick, so that a gap shows a stall."""
    if not results.timelines:
        return ""
    figure, (pane,) = new_panes(1)
    names = [name for name in _COLORS if name in results.timelines][::-1]
    for row, name in enumerate(names):
        times = results.timelines[name]
        # One line with gaps, which is a small path in the file, instead of markers.
        ticks = [x for time in times for x in (time, time, math.nan)]
        pane.plot(ticks, [row - 0.2, row + 0.2, math.nan] * len(times), color=_COLORS[name])
        first = results.values("arrival", arrival.MODEL, name, "ttft_seconds", arrival.LONG_TOKENS)
        if first:
            pane.plot(first[-1], row + 0.36, "v", color=svg.INK, markersize=6)
    pane.axvline(0, color=svg.INK, linewidth=1)
    pane.set(
        title=f"a {arrival.LONG_TOKENS:,}-token prompt arrives at 0\ntriangle: its first token",
        xlabel="seconds\neach tick is a message of the running stream",
        yticks=range(len(names)),
        yticklabels=names,
        xlim=(-0.5, None),
        ylim=(-0.6, len(names) - 0.4),
    )
    return save_plot(figure, [], folder, "arrival.svg")


def _prompt_length(results: Results, folder: Path) -> str:
    figure, (pane,) = new_panes(1)
    _lines(pane, results, "prompt-length", growth.MODEL, "ttft_seconds")
    _lines(pane, results, "long-prompts", LONG, "ttft_seconds", labelled=False)
    pane.set(
        title=f"{growth.MODEL}, a single prompt",
        xlabel="prompt tokens",
        ylabel="seconds to the first token",
        xscale="log",
        yscale="log",
    )
    ticks = (*growth.LENGTHS, *growth.LONG_LENGTHS)[::2]
    pane.set_xticks(ticks, labels=[f"{length:,}" for length in ticks])
    pane.minorticks_off()
    return save_plot(figure, [pane], folder, "prompt-length.svg")


def _prefix(results: Results, folder: Path) -> str:
    """Plot time to first token of new and of shared prompts as bar pairs per contender."""
    names = results.contenders("prefix", prefix.MODEL)
    figure, (pane,) = new_panes(1)
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
        title=f"{prefix.PROMPT_TOKENS:,}-token prompt\n"
        f"shared: all but {prefix.FRESH_TOKENS} tokens seen",
        xticks=range(len(names)),
        xticklabels=names,
        ylabel="ms to the first token",
    )
    pane.margins(y=0.25)
    return save_plot(figure, [pane], folder, "prefix.svg") if names else _drop(figure)


def _cache_entries(results: Results, folder: Path) -> str:
    figure, panes = new_panes(2)
    words = {"unrelated": "an unrelated prompt", "hit": "a prompt with a cached prefix"}
    for pane, (kind, title) in zip(panes, words.items(), strict=True):
        _lines(pane, results, "cache-entries", growth.MODEL, f"{kind}_ttft_seconds")
        pane.set(title=title, xlabel="earlier prompts", ylabel="seconds to first token", ylim=0)
    return save_plot(figure, panes, folder, "cache-entries.svg")


def _lines(
    pane: Any, results: Results, measure: str, model: str, metric: str, *, labelled: bool = True
) -> None:
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
        pane.plot(cases, medians, label=name if labelled else None, **style)
        pane.set_xticks(cases)
        lows, highs = ([edge(values) for _, values in points] for edge in (min, max))
        pane.fill_between(cases, lows, highs, color=_COLORS[name], alpha=0.15, linewidth=0)


def new_panes(count: int) -> tuple[Any, list[Any]]:
    """Return a figure with panes one below the other, as a phone needs them."""
    from matplotlib import pyplot as plt

    size = (svg.WIDTH_INCHES, _PANE_INCHES * count)
    figure, panes = plt.subplots(count, 1, figsize=size, squeeze=False)
    return figure, [row[0] for row in panes]


def save_plot(figure: Any, with_legend: list[Any], folder: Path, name: str) -> str:
    """Save the plot and return its file name, or an empty string if no pane has data."""
    if with_legend and not any(pane.has_data() for pane in with_legend):
        return _drop(figure)
    for pane in with_legend:
        pane.grid()
        if pane.has_data():
            pane.legend(frameon=False)
    figure.tight_layout()
    svg.save(figure, folder / name)
    _drop(figure)
    return name


def _drop(figure: Any) -> str:
    from matplotlib import pyplot as plt

    plt.close(figure)
    return ""
