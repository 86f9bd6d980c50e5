"""Folders of the current user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the user's cache folder by the XDG base directory specification.

    Args:
        environ: Environment with ``XDG_CACHE_HOME`` or ``HOME``.

    Returns:
        An absolute path; None if neither variable has one, as for a user without a home directory.
    """
    cache, home = Path(environ.get("XDG_CACHE_HOME", "")), Path(environ.get("HOME", ""))
    # The specification requires ignoring a relative path.
    folder = cache if cache.is_absolute() else home / ".cache"
    return folder if folder.is_absolute() else None
