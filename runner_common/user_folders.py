"""Folders of the user who runs the process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder for cached files, by the XDG base directory specification.

    Args:
        environ: The environment that names it, with ``XDG_CACHE_HOME`` or ``HOME``.

    Returns:
        An absolute path; None if the environment names none, as for a user id that has no home.
    """
    cache, home = Path(environ.get("XDG_CACHE_HOME", "")), Path(environ.get("HOME", ""))
    # The specification says to ignore a relative path.
    folder = cache if cache.is_absolute() else home / ".cache"
    return folder if folder.is_absolute() else None
