"""Section of docs/pool.md with the results of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from bench import tables
from bench.pool.measures import COLD, MODEL, RESIDENT, SPARE, SWAP, SWAPPED, TRACE, TRACED, WARM
from bench.report import machine
from bench.results import Results
from bench.stats import summarize

_TRACE_HEADS = {
    "rate": "requests per minute",
    "p50_seconds": "first token, p50",
    "p95_seconds": "first token, p95",
    "swap_seconds": "swap to first token",
    "loads_count": "loads",
    "peak_bytes": "peak memory",
}
_SWAP_WORDS = {
    COLD: "a new process for the model",
    SPARE: "load in a spare process, started before",
    WARM: "unload and load in a running process",
    RESIDENT: "the model is loaded",
}


def render(results: Results, plots: Sequence[str], folder: str) -> str:
    """Render the section as Markdown.

    Args:
        results: Results of the run.
        plots: File names of the plots.
        folder: Link target of the folder with figures and plots.
    """
    about = [*machine(results.about), f"- [the figures]({folder}/pool.json)"]
    parts = ["\n".join(about)]
    if results.models(TRACE):
        parts += [_trace_text(results), trace_table(results)]
        parts += [f"![first token and memory]({folder}/{name})" for name in plots]
    if results.models(SWAP):
        parts += [
            f"Time to first token, models {' and '.join(SWAPPED)} in turn:",
            swap_table(results),
        ]
    parts += [f"- failed: {each['contender']}: {each['why']}" for each in results.failures]
    return "\n\n".join(parts)


def _trace_text(results: Results) -> str:
    rounds = {
        len(results.values(TRACE, MODEL, name, "rate", 1))
        for name in results.contenders(TRACE, MODEL)
    }
    return (
        f"Medians of {' or '.join(map(str, sorted(rounds)))} rounds with the range in brackets. "
        f"Models: {', '.join(TRACED)} (MiB of weights). Peak memory is the proportional set of all "
        "child processes."
    )


def trace_table(results: Results) -> str:
    """Render a row for each scheduler."""
    rows = []
    for name in results.contenders(TRACE, MODEL):
        series = {metric: results.values(TRACE, MODEL, name, metric, 1) for metric in _TRACE_HEADS}
        cells = [
            tables.spread(summarize(values), metric) if values else "-"
            for metric, values in series.items()
        ]
        rows.append([name, *cells])
    return tables.markdown(["", *_TRACE_HEADS.values()], rows)


def swap_table(results: Results) -> str:
    """Render a row for each way to a first token, with the ratio to the cold one in each round."""
    cold = results.values(SWAP, MODEL, COLD, "ttft_seconds", 1)
    rows = []
    for name, words in _SWAP_WORDS.items():
        values = results.values(SWAP, MODEL, name, "ttft_seconds", 1)
        if not values:
            continue
        ratios = [value / base for value, base in zip(values, cold, strict=False)]
        share = tables.spread(summarize(ratios), "ratio") if ratios and name != COLD else "1"
        rows.append([name, words, tables.spread(summarize(values), "ttft_seconds"), share])
    return tables.markdown(["", "", "first token", "/ cold"], rows)
