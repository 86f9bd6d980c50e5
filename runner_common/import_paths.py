"""PYTHONPATH for the server's own child processes; the client leaves the variable alone."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES = ("runner_server", "runner_common", "mlxrunner")


def with_import_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with PYTHONPATH extended by the checkout's packages.

    Installed packages need no entry, and putting site-packages before the standard library
    could hide parts of the latter.
    """
    folders = dict.fromkeys(folder for name in _PACKAGES for folder in _places(name))
    extra = [
        folder for folder in folders if Path(folder).name not in ("site-packages", "dist-packages")
    ]
    given = environment.get("PYTHONPATH")
    path = os.pathsep.join([*extra, given] if given else extra)
    return {**environment, "PYTHONPATH": path} if path else dict(environment)


def _places(package: str) -> list[str]:
    """Return the folders containing a top-level package, without importing the package."""
    spec = importlib.util.find_spec(package)
    locations = (spec.submodule_search_locations if spec else None) or ()
    return [str(Path(location).absolute().parent) for location in locations]
