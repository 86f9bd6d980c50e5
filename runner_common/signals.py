"""Signals of a process from its first line on, whatever its parent left it."""

from __future__ import annotations

import os
import signal

_STOPS = frozenset((signal.SIGINT, signal.SIGTERM))


def reset_inherited_signals() -> None:
    """Undo what a process inherits: blocked signals, and an ignored SIGCHLD.

    With SIGCHLD ignored, a process never learns how its children ended: MLX takes g++ for
    missing.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def end_on_stop_signals(code: int | None = None) -> None:
    """Have SIGINT and SIGTERM end the process at once, until other handlers take their place.

    The kernel ignores a signal without a handler that is sent to process 1 of a container.

    Args:
        code: The exit code; None for the one that a shell would tell for the signal.
    """

    def end(number: int, _frame: object) -> None:
        os._exit(128 + number if code is None else code)

    for number in _STOPS:
        signal.signal(number, end)


def hold_stop_signals() -> None:
    """Have SIGINT and SIGTERM wait for the program that this process becomes.

    A blocked signal stays pending over an exec, also that of process 1.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def release_stop_signals() -> None:
    """Deliver the signals that were held."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
