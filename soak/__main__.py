"""Command line of the soak test: ``python -m soak`` drives a runner and checks the results."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from soak import paths
from soak.plots import can_draw, draw
from soak.records import SoakError
from soak.report import table, write
from soak.session import Run, Settings, soak
from soak.verdict import judge

logger = logging.getLogger("soak")

FULL_MINUTES = 30.0
MIN_MINUTES, MAX_MINUTES = 1.0, 24 * 60.0
EXIT_FAILED, EXIT_STOPPED = 1, 130

_LOG = paths.SCRATCH / "runner.log"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description="Drive one runner with the demo model at twice its capacity. A run of "
        f"{FULL_MINUTES:g} minutes or more writes soak/results, a shorter one soak/.scratch. "
        "The exit code is 0 if every check passes.",
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=FULL_MINUTES,
        help="minutes of load (default %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--out", type=Path, help="output folder for the figures")
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        full = arguments.minutes >= FULL_MINUTES
        arguments.out = paths.RESULTS if full else paths.SCRATCH
    return arguments


def _minutes(text: str) -> float:
    value = float(text)
    if not MIN_MINUTES <= value <= MAX_MINUTES:
        bounds = f"{MIN_MINUTES:g} to {MAX_MINUTES:g}"
        raise argparse.ArgumentTypeError(f"{text} is not in the range {bounds}")
    return value


def main() -> int:
    """Run a soak and return the exit code."""
    arguments = parse_args()
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(message)s")
    settings = Settings(seconds=arguments.minutes * 60, seed=arguments.seed)
    paths.SCRATCH.mkdir(parents=True, exist_ok=True)
    try:
        run = asyncio.run(_run(settings, _LOG))
    except SoakError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        logger.warning("stopped; the runner has exited")
        return EXIT_STOPPED
    return _show(run, arguments.out)


async def _run(settings: Settings, log: Path) -> Run:
    task = asyncio.current_task()
    if task:
        # SIGTERM stops the runner too, as Ctrl-C does.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await soak(settings, log)


def _show(run: Run, folder: Path) -> int:
    checks = judge(run)
    write(run, checks, folder / "soak.json")
    if can_draw():
        draw(run, folder / "soak.svg")
    else:
        logger.info("no plot: matplotlib is not installed (the bench group)")
    sys.stdout.write(table(run, checks) + "\n")
    if all(check.ok for check in checks):
        return 0
    logger.warning("the runner's log: %s", _LOG)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
