"""Printed table and JSON file of a soak."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.stats import percentile
from soak.records import Sample, Tally
from soak.session import Run
from soak.stats import MIB, own_slope, rss_slope, warm
from soak.verdict import Check

_SPREAD = (50, 90, 99)
MAX_SHOWN = 10
"""Problems shown at the end; the file has more."""


def figures(run: Run) -> dict[str, Any]:
    """Return the figures of a run, without the samples."""
    tally = run.tally
    samples = warm(run.samples, run.settings.seconds)
    return {
        "sent": tally.sent,
        "held_back": tally.held_back,
        "endings": {ending.value: count for ending, count in tally.endings.most_common()},
        "tokens": tally.tokens,
        "overload": round(tally.overload, 3),
        "known_compared": tally.compared,
        "known_cut": tally.prefixes,
        "known_differing": tally.differing,
        "first_token_seconds": spread(tally.first_seconds),
        "queue_seconds": spread(tally.queue_seconds),
        "retry_seconds": spread(tally.retry_seconds),
        "status_seconds": spread([sample.status_seconds for sample in samples]),
        "tokens_per_second": spread([sample.tokens_per_second for sample in samples]),
        "rss_mib": spread([sample.rss_bytes / MIB for sample in samples]),
        "rss_slope_mib_per_hour": round(rss_slope(samples), 2) if len(samples) > 1 else None,
        "own_slope_mib_per_hour": round(own_slope(samples), 2) if len(samples) > 1 else None,
        "idle_after_seconds": run.idle_seconds,
        "exit_code": run.exit_code,
        "problem_count": tally.problem_count,
        "problems": tally.problems,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return percentiles of a series; nothing for an empty one."""
    if not values:
        return {}
    return {f"p{percent}": round(percentile(values, percent), 4) for percent in _SPREAD}


def write(run: Run, checks: Sequence[Check], path: Path) -> None:
    """Write a run as JSON, with each sample as a row of ``sample_columns``."""
    columns = [field.name for field in dataclasses.fields(Sample)]
    whole = {
        "about": run.about,
        "settings": dataclasses.asdict(run.settings),
        "passed": all(check.ok for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
        "figures": figures(run),
        "sample_columns": columns,
        "samples": [list(dataclasses.astuple(sample)) for sample in run.samples],
    }
    write_json(whole, path)


def write_json(whole: dict[str, Any], path: Path) -> None:
    """Write the results of a run, whose last entry is ``samples``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(whole, indent=1)
    path.write_text(_rows_on_lines(text) + "\n", encoding="utf-8")


def _rows_on_lines(text: str) -> str:
    """Put each sample on one line, to keep 1,800 of them readable."""
    head, mark, rows = text.partition('"samples": [')
    if not mark:
        return text
    body = " ".join(rows.split()).replace("], [", "],\n  [")
    return head + mark + "\n  " + body


def table(run: Run, checks: Sequence[Check]) -> str:
    """Format the endings, the checks and the verdict as plain text."""
    samples = warm(run.samples, run.settings.seconds)
    whole = f"{rss_slope(samples):+.1f}" if len(samples) > 1 else "unknown"
    lines = [
        *outcomes(run.tally, run.settings.seconds),
        f"RSS including MLX's buffer cache: {whole} MiB/h after the warm-up",
        "",
        *outcome_of(checks),
        "",
        *run.tally.problems[:MAX_SHOWN],
        conclusion(checks),
    ]
    return "\n".join(lines)


def outcomes(tally: Tally, seconds: float) -> list[str]:
    """Format the numbers of requests, tokens and endings of a load."""
    ends = ", ".join(f"{count:,} {ending.value}" for ending, count in tally.endings.most_common())
    return [f"{tally.sent:,} requests in {seconds / 60:g} min, {tally.tokens:,} tokens", ends]


def outcome_of(checks: Sequence[Check]) -> list[str]:
    """Format a line for each check."""
    return [
        f"{'ok  ' if check.ok else 'FAIL'} {check.name:<30} {check.figure:<34} {check.bound}"
        for check in checks
    ]


def conclusion(checks: Sequence[Check]) -> str:
    """Format the verdict."""
    bad = sum(not check.ok for check in checks)
    return "the soak passed" if not bad else f"the soak failed: {bad} of {len(checks)} checks"
