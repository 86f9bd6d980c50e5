"""Command line of the benchmark: ``python -m bench`` measures and writes figures and report."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import paths, tables
from bench.contenders import CONTENDERS
from bench.machine import describe
from bench.measures import MEASURES
from bench.plots import draw
from bench.report import render
from bench.results import Results
from bench.session import Session, Settings
from bench.targets import evaluate

logger = logging.getLogger("bench")

_DATA = "results.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmark this runner against its peers. A full run writes bench/results and "
        "docs/benchmarks.md; any other run writes bench/.scratch.",
    )
    parser.add_argument("--quick", action="store_true", help="run the five-minute version")
    parser.add_argument(
        "--only", choices=MEASURES, action="append", help="run only this measure; repeatable"
    )
    parser.add_argument("--contenders", help="comma-separated subset of: " + ", ".join(CONTENDERS))
    parser.add_argument(
        "--render", action="store_true", help="render the last results without measuring"
    )
    arguments = parser.parse_args(argv)
    names = arguments.contenders.split(",") if arguments.contenders else list(CONTENDERS)
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"unknown contender: {', '.join(unknown)}")
    arguments.contenders = tuple(names)
    return arguments


def main() -> int:
    """Run the benchmark and return the exit code."""
    arguments = parse_args()
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(message)s")
    settings = Settings(quick=arguments.quick, contenders=arguments.contenders)
    full = not (arguments.quick or arguments.only or len(settings.contenders) < len(CONTENDERS))
    folder = paths.RESULTS if full else paths.SCRATCH
    if arguments.render:
        results = Results.read(folder / _DATA)
    else:
        results = Results()
        names = arguments.only or [
            name for name, measure in MEASURES.items() if measure.quick or not settings.quick
        ]
        try:
            asyncio.run(_measure(settings, names, results))
        except (KeyboardInterrupt, asyncio.CancelledError):
            logger.warning("stopped; all child processes have exited")
            return 130
    _write(results, folder, settings.rounds, full=full)
    return 0


async def _measure(settings: Settings, names: Sequence[str], results: Results) -> None:
    """Run the measures, saving the figures to the scratch folder after each one.

    Only a full run that completes replaces the committed figures.
    """
    end_in_order_when_terminated()
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    results.about = await asyncio.to_thread(describe)
    session = Session(settings, results)
    try:
        for name in names:
            begin = time.monotonic()
            await MEASURES[name].run(session)
            results.write(paths.SCRATCH / _DATA)
            logger.info("%s: %.0f s", name, time.monotonic() - begin)
    finally:
        await session.close()


def end_in_order_when_terminated() -> None:
    """Make SIGTERM stop the children too, as Ctrl-C does."""
    task = asyncio.current_task()

    def end() -> None:
        logger.warning("got SIGTERM")
        if task:
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)


def _write(results: Results, folder: Path, rounds: int, *, full: bool) -> None:
    plots = draw(results, folder)
    results.write(folder / _DATA)
    if full:
        report = render(results, plots, f"../{folder.relative_to(paths.ROOT).as_posix()}", rounds)
        paths.REPORT.write_text(report, encoding="utf-8")
    else:
        report = render(results, plots, ".", rounds)
        (folder / "benchmarks.md").write_text(report, encoding="utf-8")
    sys.stdout.write(tables.verdicts(evaluate(results)) + "\n")
    logger.info("figures and plots: %s", folder.relative_to(paths.ROOT))


if __name__ == "__main__":
    sys.exit(main())
