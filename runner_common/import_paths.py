"""What a child needs on PYTHONPATH to import the packages of its parent's checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES = ("runner_server", "runner_common", "mlxrunner")


def with_import_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """Adds to PYTHONPATH what a checkout has on ``sys.path`` and a child would miss.

    Installed packages are found anyway; putting their folder before the standard
    library could hide parts of it.
    """
    places = dict.fromkeys(place for name in _PACKAGES for place in _places(name))
    extra = [
        place for place in places if Path(place).name not in ("site-packages", "dist-packages")
    ]
    given = environment.get("PYTHONPATH")
    path = os.pathsep.join([*extra, given] if given else extra)
    return {**environment, "PYTHONPATH": path} if path else dict(environment)


def _places(package: str) -> list[str]:
    """The folders that a top-level package lies in, found without importing it."""
    spec = importlib.util.find_spec(package)
    locations = (spec.submodule_search_locations if spec else None) or ()
    return [str(Path(location).absolute().parent) for location in locations]
