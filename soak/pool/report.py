"""Printed table, JSON file and section of docs/pool.md of a pool soak."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tables import markdown
from soak.pool.records import Phase, PoolRun, PoolSample
from soak.pool.verdict import judge_phase, judge_whole
from soak.report import MAX_SHOWN, conclusion, outcome_of, outcomes, spread, write_json
from soak.stats import MIB
from soak.verdict import Check

_KEPT_SAMPLES = 600

COLUMNS = ("phase", "seconds", "models", "rss_mib", "pss_mib", "descriptors", "threads")


def thinned(samples: Sequence[PoolSample]) -> list[PoolSample]:
    """Return at most 600 samples: of each span of time, the one with the most memory."""
    size = max(1, math.ceil(len(samples) / _KEPT_SAMPLES))
    spans = (samples[i : i + size] for i in range(0, len(samples), size))
    return [max(span, key=lambda sample: sample.held_bytes) for span in spans]


def write(run: PoolRun, checks: Sequence[Check], path: Path) -> None:
    """Write a run as JSON, with each of the kept samples as a row of ``sample_columns``."""
    whole = {
        "about": run.about,
        "settings": dataclasses.asdict(run.settings),
        "passed": all(check.ok for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
        "phases": {phase.name: _figures(phase) for phase in run.phases},
        "sample_columns": COLUMNS,
        "samples": [
            _row(phase, sample) for phase in run.phases for sample in thinned(phase.samples)
        ],
    }
    write_json(whole, path)


def _figures(phase: Phase) -> dict[str, Any]:
    tally = phase.tally
    return {
        "seconds": phase.seconds,
        "limit_bytes": phase.limit_bytes,
        "needs": dict(phase.needs),
        "sent": tally.sent,
        "endings": {ending.value: count for ending, count in tally.endings.most_common()},
        "served": dict(phase.served),
        "loads": dict(phase.loads),
        "tokens": tally.tokens,
        "lease_seconds": spread(tally.queue_seconds),
        "first_token_seconds": spread(tally.first_seconds),
        "rss_mib": spread([sample.held_bytes / MIB for sample in phase.samples]),
        "pss_mib": spread([sample.pss_bytes / MIB for sample in phase.samples]),
        "problem_count": tally.problem_count,
        "problems": tally.problems,
    }


def _row(phase: Phase, sample: PoolSample) -> list[Any]:
    sizes = {name: round(size / MIB, 1) for name, size in sorted(sample.by_model().items())}
    held, proportional = round(sample.held_bytes / MIB, 1), round(sample.pss_bytes / MIB, 1)
    rest = [sample.descriptors, sample.threads]
    return [phase.name, sample.seconds, sizes, held, proportional, *rest]


def table(run: PoolRun, checks: Sequence[Check]) -> str:
    """Format the endings of each phase, the checks and the verdict as plain text."""
    lines = []
    for phase in run.phases:
        lines += [f"{phase.name}:", *outcomes(phase.tally, phase.seconds), ""]
        lines += [*outcome_of(judge_phase(phase)), ""]
    lines += [*outcome_of(judge_whole(run)), ""]
    problems = [problem for phase in run.phases for problem in phase.tally.problems]
    return "\n".join([*lines, *problems[:MAX_SHOWN], conclusion(checks)])


def section(run: PoolRun, checks: Sequence[Check], plot: str) -> str:
    """Format the results as Markdown.

    Args:
        run: The run.
        checks: Result of every check.
        plot: Link target of the plot.
    """
    about = run.about
    machine = f"{about['cores']} cores, {about['system']}, Python {about['python']}"
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    load = about["load_average"][0]
    text = (
        f"{run.settings.seconds / 60:g} minutes on {machine}; load average {load:g} at the start. "
        f"{packages}; {about['time']}. {conclusion(checks).capitalize()}."
    )
    parts = [text, *(_words(phase) for phase in run.phases)]
    rows = [
        [same[0].name, *(f"{check.figure} ({check.bound})" for check in same)]
        for same in zip(*map(judge_phase, run.phases), strict=False)
    ]
    rest = [""] * (len(run.phases) - 1)
    rows += [[each.name, f"{each.figure} ({each.bound})", *rest] for each in judge_whole(run)]
    heads = ["check", *(phase.name for phase in run.phases)]
    parts += [markdown(heads, rows), f"![memory by model over time]({plot})"]
    return "\n\n".join(parts)


def _words(phase: Phase) -> str:
    first, _, rest = "; ".join(outcomes(phase.tally, phase.seconds)).partition(";")
    waits = spread(phase.tally.first_seconds)
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in waits.items())
    return f"{phase.name.capitalize()}: {first} ({rest.strip()}); first token {times}."
