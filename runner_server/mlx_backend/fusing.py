"""Selection of a folder in which MLX compiles fused kernels; without one, fusing is disabled."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from runner_server.host.compiler import CompilerError, check_compiler
from runner_server.host.kernel_folder import (
    KernelFolder,
    NoKernelFolderError,
    keep_nothing,
    open_kernels,
)

logger = logging.getLogger(__name__)

_VERSION: str = vars(mx)["__version__"]


def private_kernels() -> KernelFolder | None:
    """Make MLX compile kernels in a private folder of this user, or disable fusing.

    Returns:
        The folder, already in use; None if fusing is disabled, for a reason that is logged.
    """
    try:
        kernels = open_kernels(_VERSION, check=_check)
    except (NoKernelFolderError, CompilerError) as error:
        logger.warning("kernels are not fused, which is slower on a CPU: %s", error)
        _switch_off()
        return None
    kernels.use()
    return kernels


@contextmanager
def kernels_of_this_run(*, checks: bool) -> Iterator[Path]:
    """Make MLX compile kernels in an empty folder, which is removed at the end.

    Args:
        checks: Whether to check that kernels can be compiled and loaded there.

    Yields:
        The folder of compiled libraries.

    Raises:
        NoKernelFolderError: No folder can hold kernels.
        CompilerError: g++ failed.
    """
    check = _check if checks else _accept
    kernels = open_kernels(_VERSION, check=check, keeps=False)
    kernels.use()
    try:
        yield kernels.libraries
    finally:
        kernels.close()


def _accept(_folder: Path) -> None:
    """Accept any private folder."""


def _check(folder: Path) -> None:
    """Check that kernels can be compiled in a folder and loaded from it, if MLX would do so.

    Raises:
        CompilerError: g++ failed.
        OSError: The folder does not allow loading libraries, or its disk is full.
    """
    is_cpu = mx.default_device() == mx.Device(mx.cpu)
    # Without g++ MLX does not fuse on a CPU, and on a GPU it loads no libraries.
    if is_cpu and shutil.which("g++") and "MLX_DISABLE_COMPILE" not in os.environ:
        check_compiler(folder)


def _switch_off() -> None:
    mx.disable_compile()
    keep_nothing()
