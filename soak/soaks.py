"""The soaks by name: how each one is run, judged and shown."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from bench.page import replace_part
from soak import paths, plots, report, session, verdict
from soak.pool import plots as pool_plots
from soak.pool import report as pool_report
from soak.pool import session as pool_session
from soak.pool import verdict as pool_verdict
from soak.pool.records import PoolRun
from soak.session import Settings
from soak.verdict import Check

POOL_PART = "make soak-pool"
"""Generated part of docs/pool.md."""

R = TypeVar("R")


@dataclass(frozen=True)
class Soak(Generic[R]):
    """One kind of soak, whose results are an ``R``.

    Attributes:
        stem: Name of the files with figures and plot.
        run: Runs it, with a file for the log.
        judge: Returns the result of every check.
        write: Writes the figures.
        draw: Draws the plot.
        table: Formats the results as plain text.
        publish: Updates the generated part of the documents, after a full run.
    """

    stem: str
    run: Callable[[Settings, Path], Awaitable[R]]
    judge: Callable[[R], list[Check]]
    write: Callable[[R, Sequence[Check], Path], None]
    draw: Callable[[R, Path], None]
    table: Callable[[R, Sequence[Check]], str]
    publish: Callable[[R, Sequence[Check]], None] = lambda _run, _checks: None


AnySoak = Soak[Any]


def _publish_pool(run: PoolRun, checks: Sequence[Check]) -> None:
    plot = f"../{(paths.RESULTS / 'pool.svg').relative_to(paths.ROOT).as_posix()}"
    text = pool_report.section(run, checks, plot)
    replace_part(paths.ROOT / "docs" / "pool.md", POOL_PART, text)


SOAKS: dict[str, AnySoak] = {
    "runner": Soak(
        "soak",
        session.soak,
        verdict.judge,
        report.write,
        plots.draw,
        report.table,
    ),
    "pool": Soak(
        "pool",
        pool_session.soak,
        pool_verdict.judge,
        pool_report.write,
        pool_plots.draw,
        pool_report.table,
        _publish_pool,
    ),
}
