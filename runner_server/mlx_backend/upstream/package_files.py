"""Files of mlx_lm, found without importing mlx_lm."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_PACKAGE = "mlx_lm"
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
"""Names come from models' files and become paths."""


def package_file(folder: str, name: object) -> Path | None:
    """Return the file of a module in a folder of mlx_lm; None if there is none."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not isinstance(name, str) or not _NAME.fullmatch(name):
        return None
    for location in spec.submodule_search_locations or ():
        file = Path(location) / folder / f"{name}.py"
        if file.is_file():
            return file
    return None
