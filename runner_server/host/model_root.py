"""Restriction of models to a directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelRoot:
    """Directory that must contain all files of a model, with symbolic links resolved.

    Attributes:
        path: The directory, resolved.
    """

    path: Path

    def has(self, model: Path) -> bool:
        """Return whether a model's directory and the targets of its links are inside the root.

        Args:
            model: The model's directory, resolved.

        Raises:
            OSError: The directory cannot be read, or links form a circle.
            RuntimeError: Links form a circle, before Python 3.13.
        """
        return model.is_relative_to(self.path) and all(
            _target(link).is_relative_to(self.path) for link in _links(model)
        )


def _target(link: Path) -> Path:
    try:
        # Since Python 3.13, only strict resolution refuses circular links.
        return link.resolve(strict=True)
    except FileNotFoundError:
        return link.resolve()


def _links(folder: Path) -> list[Path]:
    # os.walk does not follow links to directories.
    entries = (
        Path(parent, name)
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )
    return [entry for entry in entries if entry.is_symlink()]
