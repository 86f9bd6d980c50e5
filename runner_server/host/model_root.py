"""The directory that models are confined to, if there is one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelRoot:
    """Tells what lies below a directory, after all symbolic links.

    Attributes:
        path: The directory, resolved.
    """

    path: Path

    def has(self, model: Path) -> bool:
        """Whether a model's directory lies below, with all that links in it lead to.

        Args:
            model: The directory, resolved.

        Raises:
            OSError: It cannot be looked into.
            RuntimeError: A link leads back to itself.
        """
        return model.is_relative_to(self.path) and all(
            _target(link).is_relative_to(self.path) for link in _links(model)
        )


def _target(link: Path) -> Path:
    try:
        # From Python 3.13 on only a strict one refuses links in a ring.
        return link.resolve(strict=True)
    except FileNotFoundError:
        return link.resolve()


def _links(folder: Path) -> list[Path]:
    # It does not enter the directories that links lead to.
    entries = (
        Path(place, name)
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )
    return [entry for entry in entries if entry.is_symlink()]
