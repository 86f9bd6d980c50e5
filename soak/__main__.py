"""Command line of the soak tests: ``python -m soak`` drives runners and checks the results."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from soak import paths
from soak.plots import can_draw
from soak.records import SoakError
from soak.session import Settings
from soak.soaks import SOAKS, AnySoak

logger = logging.getLogger("soak")

FULL_MINUTES = 30.0
MIN_MINUTES, MAX_MINUTES = 1.0, 24 * 60.0
EXIT_FAILED, EXIT_STOPPED = 1, 130


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description="Drive one runner with the demo model at twice its capacity, or pools with "
        f"five models in the memory of two. A run of {FULL_MINUTES:g} minutes or more writes "
        "soak/results, a shorter one soak/.scratch. The exit code is 0 if every check passes.",
    )
    parser.add_argument(
        "name", nargs="?", choices=SOAKS, default="runner", help="default: %(default)s"
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
    soak, log = SOAKS[arguments.name], paths.SCRATCH / f"{arguments.name}.log"
    try:
        run = asyncio.run(_run(soak, settings, log))
    except SoakError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        logger.warning("stopped; the runners have exited")
        return EXIT_STOPPED
    return _show(soak, run, arguments.out, log)


async def _run(soak: AnySoak, settings: Settings, log: Path) -> object:
    task = asyncio.current_task()
    if task:
        # SIGTERM stops the runners too, as Ctrl-C does.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await soak.run(settings, log)


def _show(soak: AnySoak, run: object, folder: Path, log: Path) -> int:
    checks = soak.judge(run)
    soak.write(run, checks, folder / f"{soak.stem}.json")
    if can_draw():
        soak.draw(run, folder / f"{soak.stem}.svg")
    else:
        logger.info("no plot: matplotlib is not installed (the bench group)")
    if folder == paths.RESULTS:
        soak.publish(run, checks)
    sys.stdout.write(soak.table(run, checks) + "\n")
    if all(check.ok for check in checks):
        return 0
    logger.warning("the log: %s", log)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
