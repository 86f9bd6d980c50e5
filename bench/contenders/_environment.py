"""The environment of a contender's process: the same BLAS for all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runner_client.host.environment import child_environment, package_folders
from runner_common.host_memory.free import Backend


def environment(blas: str = "auto", python: Path | None = None) -> dict[str, str]:
    """The environment a runner would get.

    Args:
        blas: ``"auto"`` or ``"off"``.
        python: The interpreter, if not this one: its own MLX must be found.
    """

    def folders(package: str) -> tuple[Path, ...]:
        if python is None:
            return package_folders(package)
        return tuple(python.parent.parent.glob(f"lib/python*/site-packages/{package}"))

    backend: Backend = "metal" if sys.platform == "darwin" else "cpu"
    return child_environment(os.environ, backend=backend, blas=blas, folders=folders)
