"""Containment of the side effects of importing a library."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

logger = logging.getLogger(__name__)


class LibraryExitError(Exception):
    """A library called ``sys.exit`` during import."""


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Log the output of a library during import, and turn ``sys.exit`` into an exception.

    mlx_lm's module for OLMo prints advice and calls ``sys.exit`` if a package is missing, and
    standard output is reserved for the ready line or an estimate.

    Args:
        what: The library's name, for the log and the error.

    Raises:
        LibraryExitError: The library called ``sys.exit``. The message has the text it printed.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    except SystemExit as error:
        said = f", after printing {text!r}" if (text := printed.getvalue().strip()) else ""
        raise LibraryExitError(f"{what} ended with exit code {error.code}{said}") from error
    finally:
        if text := printed.getvalue().strip():
            logger.info("%s printed %r", what, text)
