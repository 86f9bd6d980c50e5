"""Signal handling at process start, independent of the parent's settings."""

from __future__ import annotations

import os
import signal

_STOPS = frozenset((signal.SIGINT, signal.SIGTERM))


def reset_inherited_signals() -> None:
    """Reset inherited signal state: blocked signals and an ignored SIGCHLD.

    With SIGCHLD ignored, a process never learns the exit status of its children, and MLX
    concludes that g++ is missing.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def end_on_stop_signals(code: int | None = None) -> None:
    """Make SIGINT and SIGTERM end the process at once, until replaced by other handlers.

    The kernel drops signals without a handler that are sent to process 1 of a container.

    Args:
        code: The exit code; None for the shell's code of the signal.
    """

    def end(number: int, _frame: object) -> None:
        os._exit(128 + number if code is None else code)

    for number in _STOPS:
        signal.signal(number, end)


def hold_stop_signals() -> None:
    """Block SIGINT and SIGTERM until released by the program about to be exec'd.

    A blocked signal stays pending across exec, even in process 1.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def release_stop_signals() -> None:
    """Unblock SIGINT and SIGTERM and deliver pending ones."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
