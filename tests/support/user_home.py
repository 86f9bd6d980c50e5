"""A home folder for the test session instead of the user's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_USER = dict(os.environ)
_HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_TOOL_CACHES = {"GOCACHE": "go-build", "PIP_CACHE_DIR": "pip"}


def replace_home(home: Path) -> None:
    """Point the home and cache folders of this process and its children to another folder.

    Tests thus neither read nor write the user's estimates, BLAS choice, kernels or hub cache.

    Args:
        home: An existing folder. One for the whole session, so that tests share estimates.
    """
    for variable in _HUB_VARIABLES:
        os.environ.pop(variable, None)
    os.environ |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}


def toolchain_variables() -> dict[str, str]:
    """Return variables with which compilers and package managers find the user's downloads.

    Without these a build would fetch everything again. The cache folder stays the session's, and
    with it the one of runners that are started by the built programs.
    """
    if not (home := _USER.get("HOME")):
        return {}
    variables = {"HOME": home}
    if sys.platform == "linux":
        cache = Path(_USER.get("XDG_CACHE_HOME") or f"{home}/.cache")
        variables |= {name: str(cache / folder) for name, folder in _TOOL_CACHES.items()}
    return variables | {name: _USER[name] for name in _TOOL_CACHES if name in _USER}
