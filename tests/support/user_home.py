"""A home folder for the test session instead of the user's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runner_server.host.kernel_folder import IN_CACHE, kernel_set
from runner_server.host.private_folder import private_folder

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


def share_kernels(home: Path, shared: Path) -> None:
    """Keep the kernels compiled in a home folder together with those of other sessions.

    g++ takes a second for each, and all tests together need more than fifty. Runners check a kernel
    of an earlier process before they load it. No-op without MLX.

    Args:
        home: The folder given to :func:`replace_home`, still empty.
        shared: An existing folder for the kernels of all sessions.
    """
    try:
        import mlx.core as mx
    except ImportError:
        return
    name = kernel_set(vars(mx)["__version__"])
    (shared / name).mkdir(exist_ok=True)
    # The folder itself is for one session: each locks and removes the folders of its processes.
    kernels = private_folder(home / ".cache" / IN_CACHE)
    (kernels / name).symlink_to(shared / name)


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
