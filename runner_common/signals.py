"""Signal handling at process start, independent of the parent's settings."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

EXIT_INTERRUPTED = 130
"""Exit code that a shell reports for a process ended by Ctrl-C: 128 + SIGINT."""

SHOW_CURSOR = "\x1b[?25h"
"""Terminal sequence that undoes the hidden cursor of a progress bar."""

_STOPS = frozenset((signal.SIGINT, signal.SIGTERM))


class Interrupted(SystemExit):
    """Raised in a command on SIGINT.

    Unlike ``KeyboardInterrupt``, it ends the process without a traceback wherever it is raised, and
    click does not turn it into exit code 1.
    """


def reset_inherited_signals() -> None:
    """Reset inherited signal state: blocked signals and an ignored SIGCHLD.

    With SIGCHLD ignored, a process cannot get the exit status of its children, from which MLX would
    conclude that g++ is missing.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def end_on_stop_signals(code: int | None = None) -> None:
    """Make SIGINT and SIGTERM end the process at once, until replaced by other handlers.

    Without a handler, the kernel drops signals that are sent to process 1 of a container.

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
    """Unblock SIGINT and SIGTERM, which delivers pending ones."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def end_on_interrupt() -> None:
    """Make SIGINT end the process at once with code 130. No-op where the parent ignores SIGINT."""
    _handle_interrupts(_end_interrupted)


def raise_on_interrupt() -> None:
    """Make SIGINT raise ``Interrupted``. No-op where the parent ignores SIGINT.

    An exception in a finalizer or in a callback of C code would not reach the command, so such an
    interrupt ends the process at once. Children notice the end of their parent.
    """
    sys.unraisablehook = _end_if_interrupted
    _handle_interrupts(_raise_interrupted)


def ignore_interrupts() -> None:
    """Ignore SIGINT from now on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _handle_interrupts(handler: Callable[[int, FrameType | None], None]) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _raise_interrupted(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted(EXIT_INTERRUPTED)


def _end_interrupted(_number: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def _end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    if not issubclass(unraisable.exc_type, Interrupted):
        sys.__unraisablehook__(unraisable)
        return
    if os.isatty(2):
        os.write(2, SHOW_CURSOR.encode())
    os._exit(EXIT_INTERRUPTED)
