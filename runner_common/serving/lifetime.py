"""Begin and end of a server process: the ready line, stop signals, the socket's file."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner_common.handshake import ReadyLine

logger = logging.getLogger(__name__)


def install_signals(stop: Callable[[], object], exit_now: Callable[[int], object]) -> None:
    """Begin an orderly shutdown on SIGINT or SIGTERM; exit at once on a second signal.

    Args:
        stop: Begins the shutdown.
        exit_now: Ends the process with an exit code.
    """
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def on_signal(number: int) -> None:
        if seen:
            exit_now(128 + number)
        seen.append(number)
        logger.info("stopping on %s", signal.Signals(number).name)
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)


def exit_at_once(ready: ReadyLine | None, code: int) -> NoReturn:
    """End the process at once; clean up nothing but the file of a unix socket."""
    if ready and ready.network == "unix":
        Path(ready.address).unlink(missing_ok=True)
    os._exit(code)


def announce(ready: ReadyLine) -> None:
    """Print the ready line on standard output."""
    logger.info("listening on %s", ready.target)
    # sys.stdout is redirected while the engine thread loads a model. sys.__stdout__ is None if
    # descriptor 1 was closed at start, even if another file has that number now.
    stdout = sys.__stdout__
    if stdout is None:
        logger.warning("stdout is closed, so the ready line cannot be printed; serving anyway")
        return
    try:
        stdout.write(ready.format() + "\n")
        stdout.flush()
    except OSError as error:
        logger.warning("the ready line cannot be printed (stdout: %s); serving anyway", error)
