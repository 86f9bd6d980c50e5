"""Keeps what a library does while it is imported from the process around it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

logger = logging.getLogger(__name__)


class LibraryExitError(Exception):
    """A library has asked the process to end."""


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Log what a library prints on standard output, and keep it from ending the process.

    mlx_lm's module for OLMo prints advice and calls ``sys.exit`` where a package is missing;
    standard output is for the ready line, or for an estimate.

    Args:
        what: Whose code runs, for the message.

    Raises:
        LibraryExitError: It called ``sys.exit``; with what it had printed.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    except SystemExit as error:
        said = f", after it had printed {text!r}" if (text := printed.getvalue().strip()) else ""
        raise LibraryExitError(f"{what} ended with exit code {error.code}{said}") from error
    finally:
        if text := printed.getvalue().strip():
            logger.info("%s printed %r", what, text)
