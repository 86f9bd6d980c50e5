"""The Python interpreter for child processes."""

from __future__ import annotations

import sys


class NoInterpreterError(OSError):
    """``sys.executable`` is not a Python interpreter. The message says why."""


def interpreter() -> str:
    """Return the path of this process's Python interpreter.

    Raises:
        NoInterpreterError: Python is embedded in another program, or part of a frozen program,
            which would start another copy of itself.
    """
    if not sys.executable:
        raise NoInterpreterError("sys.executable is empty, as in an embedded Python")
    # Set by PyInstaller, cx_Freeze, py2app and others.
    if getattr(sys, "frozen", False):
        raise NoInterpreterError(
            f"this program is frozen: sys.executable, {sys.executable}, is the program and not a "
            "Python, and would start itself"
        )
    return sys.executable
