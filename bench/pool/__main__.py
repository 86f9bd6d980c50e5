"""Command line: ``python -m bench.pool`` measures, and writes figures, plot and tables."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import paths
from bench.__main__ import end_in_order_when_terminated
from bench.machine import describe
from bench.page import replace_part
from bench.pool.measures import MEASURES, Settings
from bench.pool.plots import draw
from bench.pool.report import render
from bench.results import Results

logger = logging.getLogger("bench")

PART = "make bench-pool"
_DATA = "pool.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pool",
        description="Benchmark schedulers of many models. A full run writes bench/results and the "
        "tables of docs/pool.md; any other run writes bench/.scratch.",
    )
    parser.add_argument("--quick", action="store_true", help="run a short version")
    parser.add_argument("--only", choices=MEASURES, action="append", help="run only this measure")
    parser.add_argument(
        "--render", action="store_true", help="render the last results without measuring"
    )
    return parser.parse_args(argv)


def main() -> int:
    """Run the benchmark and return the exit code."""
    arguments = parse_args()
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(message)s")
    # The loads and evictions of the pool are not news here.
    logging.getLogger("runner_client").setLevel("ERROR")
    full = not (arguments.quick or arguments.only)
    folder = paths.RESULTS if full else paths.SCRATCH
    if arguments.render:
        results = Results.read(folder / _DATA)
    else:
        results = Results()
        try:
            names = arguments.only or list(MEASURES)
            asyncio.run(_measure(Settings(quick=arguments.quick), names, results))
        except (KeyboardInterrupt, asyncio.CancelledError):
            logger.warning("stopped; all child processes have exited")
            return 130
    write(results, folder, full=full)
    return 0


async def _measure(settings: Settings, names: Sequence[str], results: Results) -> None:
    end_in_order_when_terminated()
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    results.about = await asyncio.to_thread(describe)
    for name in names:
        await MEASURES[name](settings, results)
        results.write(paths.SCRATCH / _DATA)


def write(results: Results, folder: Path, *, full: bool) -> None:
    """Write figures and plot, and the tables into docs/pool.md if the run was a full one."""
    plots = draw(results, folder)
    results.write(folder / _DATA)
    if full:
        link = f"../{folder.relative_to(paths.ROOT).as_posix()}"
        replace_part(paths.ROOT / "docs" / "pool.md", PART, render(results, plots, link))
    text = render(results, plots, ".")
    if not full:
        (folder / "pool.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
