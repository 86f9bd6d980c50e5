"""Markdown tables from results."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import Case, Results
from bench.stats import Summary, percentile, summarize
from bench.targets import Target, Verdict

_NOTHING = "-"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with a text column followed by right-aligned figures."""
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def duration(seconds: float) -> str:
    """Format a duration with three digits, in milliseconds below one second."""
    return f"{figure(seconds * 1000)} ms" if seconds < 1 else f"{figure(seconds)} s"


def figure(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 100 up."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def mebibytes(value: float) -> str:
    """Format bytes as MiB."""
    return f"{figure(value / 2**20)} MiB"


_FORMS = {"seconds": duration, "bytes": mebibytes, "rate": figure}


def spread(summary: Summary, metric: str) -> str:
    """Format a median with the range in brackets."""
    form = _FORMS.get(metric.rpartition("_")[2], figure)
    if summary.count == 1:
        return form(summary.median)
    return f"{form(summary.median)} ({form(summary.low)} to {form(summary.high)})"


def by_case(
    results: Results, measure: str, model: str, metric: str, heads: dict[Case, str] | None = None
) -> str:
    """Format a table with a row for each contender and a column for each case.

    Args:
        results: Results of the run.
        measure: Name of the measure.
        model: Name of the model.
        metric: Name of the metric, ending in the unit.
        heads: Column headings of the cases to show; every case by default.
    """
    cases = heads or {case: str(case) for case in results.cases(measure, model, metric)}
    rows = []
    for contender in results.contenders(measure, model):
        series = [results.values(measure, model, contender, metric, case) for case in cases]
        cells = [spread(summarize(values), metric) if values else _NOTHING for values in series]
        if any(series):
            rows.append([contender, *cells])
    return markdown(["", *cases.values()], rows)


def latencies(results: Results, model: str) -> str:
    """Format the table of health call latencies: median, p99, highest."""
    rows = []
    for contender in results.contenders("health", model):
        for call in results.cases("health", model, "latency_seconds"):
            values = results.values("health", model, contender, "latency_seconds", call)
            if values:
                cells = [duration(percentile(values, percent)) for percent in (50, 99, 100)]
                rows.append([f"{contender}: {call}", *cells, f"{len(values):,}"])
    return markdown(["", "median", "p99", "highest", "calls"], rows)


def verdicts(judged: Sequence[Verdict]) -> str:
    """Format the table of targets, with a sentence about each missed one."""
    rows = [
        [verdict.target.what, _bound(verdict.target), _reached(verdict), _outcome(verdict)]
        for verdict in judged
    ]
    return markdown(["target", "bound", "reached", "outcome"], rows)


def _outcome(verdict: Verdict) -> str:
    if verdict.met is None or verdict.reading is None:
        return "not measured"
    if verdict.met:
        return "met"
    reading, limit = verdict.reading, verdict.target.limit
    percent = figure(abs(reading.value / limit - 1) * 100)
    place = "within" if verdict.is_within_spread else "outside"
    low, high = (_with_unit(verdict.target, value) for value in (reading.low, reading.high))
    return f"**Missed** by {percent} %, {place} the spread of the rounds ({low} to {high})."


def _bound(target: Target) -> str:
    word = "at most" if target.at_most else "at least"
    return f"{word} {_with_unit(target, target.limit)}"


def _reached(verdict: Verdict) -> str:
    return _NOTHING if verdict.figure is None else _with_unit(verdict.target, verdict.figure)


def _with_unit(target: Target, value: float) -> str:
    return duration(value) if target.unit else figure(value)
