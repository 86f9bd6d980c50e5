"""mlx_lm's chat templates in Python, found without importing mlx_lm."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_PACKAGE = "mlx_lm"
_FUNCTION = "\ndef apply_chat_template("
_NAME = re.compile(r"[a-z0-9_]{1,64}")
"""Names come from models' files and become paths."""


def python_template_file(name: object) -> str:
    """Return the file of the template with this name; empty if mlx_lm has none."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not isinstance(name, str) or not _NAME.fullmatch(name):
        return ""
    for location in spec.submodule_search_locations or ():
        file = Path(location) / "chat_templates" / f"{name}.py"
        if file.is_file() and _FUNCTION in file.read_text(encoding="utf-8"):
            return str(file)
    return ""
