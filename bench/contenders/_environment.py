"""Environment of a contender's process, with the same BLAS for every contender."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runner_client.host.environment import child_environment, package_folders
from runner_common.host_memory.free import Backend


def environment(blas: str = "auto", python: Path | None = None) -> dict[str, str]:
    """Return the environment that the client would give a runner.

    Args:
        blas: ``"auto"`` or ``"off"``.
        python: Interpreter of another environment, whose MLX is used to find the BLAS.
    """

    def folders(package: str) -> tuple[Path, ...]:
        if python is None:
            return package_folders(package)
        return tuple(python.parent.parent.glob(f"lib/python*/site-packages/{package}"))

    backend: Backend = "metal" if sys.platform == "darwin" else "cpu"
    return child_environment(os.environ, backend=backend, blas=blas, folders=folders)
