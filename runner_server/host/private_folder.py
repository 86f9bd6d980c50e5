"""Folders in which no other user can create or change files."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UntrustedFolderError(OSError):
    """Another user could write to a folder, or replace it."""


def private_folder(path: Path) -> Path:
    """Create a folder that is private to this user, or check that an existing one is.

    Returns:
        The path with the links of its parents resolved, so that the path in use is the one that
        was checked.

    Raises:
        UntrustedFolderError: The path exists and belongs to another user, is open to others, or is
            not a folder; or another user could rename it.
        OSError: The folder cannot be created.
    """
    nearest = next(above for above in path.absolute().parents if above.exists())
    _check_above(nearest.resolve(strict=True))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    real = path.parent.resolve(strict=True) / path.name
    _check_above(real.parent)
    status = real.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UntrustedFolderError(f"{real} is a link or a file, not a folder")
    if status.st_uid != os.geteuid():
        raise UntrustedFolderError(f"{real} belongs to user {status.st_uid}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise UntrustedFolderError(
            f"{real} is open to other users (mode {stat.S_IMODE(status.st_mode):04o}); remove it"
        )
    return real


def _check_above(folder: Path) -> None:
    """Check that only root and this user can rename the entries of a resolved folder."""
    # The owner of / is root, whose id may differ in a container.
    trusted = {0, os.geteuid(), Path("/").stat().st_uid}
    for above in (folder, *folder.parents):
        status = above.stat()
        if status.st_uid not in trusted:
            raise UntrustedFolderError(f"{above} belongs to user {status.st_uid}")
        # In a sticky folder such as /tmp only the owner of a file may rename it.
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise UntrustedFolderError(
                f"other users may write to {above} (mode {stat.S_IMODE(status.st_mode):04o})"
            )
