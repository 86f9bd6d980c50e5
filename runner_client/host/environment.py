"""Environment of a runner process: library paths for MLX, and a fast BLAS.

The parent prepares the environment, because a process cannot preload libraries once it runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner_client.host.blas import Blas, blas_at, find_blas, in_front
from runner_client.host.blas_choice import choose_blas

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runner_common.host_memory.free import Backend

__all__ = ["Blas", "child_environment", "find_blas", "package_folders"]

_LIBRARY_PATHS = {"linux": "LD_LIBRARY_PATH", "win32": "PATH"}
_SYSTEM_CUDA = Path("/usr/local/cuda")


def package_folders(package: str) -> tuple[Path, ...]:
    """Find the folders of a top-level package without an import; empty if not installed."""
    spec = importlib.util.find_spec(package)
    return tuple(Path(folder) for folder in (spec and spec.submodule_search_locations) or ())


def child_environment(
    base: Mapping[str, str],
    *,
    backend: Backend,
    blas: str = "auto",
    system: str = sys.platform,
    folders: Callable[[str], tuple[Path, ...]] = package_folders,
    find: Callable[[Mapping[str, str]], Blas | None] = choose_blas,
) -> dict[str, str]:
    """Return the environment in which to start a runner.

    * Linux: ``LD_LIBRARY_PATH`` begins with the library folders of MLX and, for CUDA, of
      NVIDIA's packages; on Windows ``PATH`` does.
    * CUDA: ``CUDA_HOME`` and ``CUDA_PATH`` name the headers for MLX's kernel compiler, unless
      one of them is set.
    * Linux CPU: ``LD_PRELOAD`` ends with a fast BLAS if one is installed and none is preloaded:
      the fastest found by ``mlx-runner doctor`` on this machine, or without a measurement
      OpenBLAS before MKL.

    Everything else in ``base`` is kept. Not measured on CUDA or Windows.

    Args:
        base: The environment to start from, usually ``os.environ``.
        backend: The backend of MLX.
        blas: ``"auto"``, ``"off"``, or the path of a shared library.
        system: ``sys.platform`` of the machine.
        folders: Returns the folders of a package.
        find: Returns the BLAS for ``"auto"``, given the runner's environment.

    Raises:
        InvalidRequestError: ``blas`` names no file, or a path that cannot be preloaded.
    """
    environment = dict(base)
    if variable := _LIBRARY_PATHS.get(system):
        _prepend(environment, variable, _library_folders(backend, folders))
    if backend == "cuda":
        _point_at_cuda_headers(environment, folders)
    if system == "linux" and backend == "cpu" and blas != "off":
        library = find(environment) if blas == "auto" else blas_at(Path(blas))
        return in_front(environment, library) if library else environment
    return environment


def _library_folders(backend: Backend, folders: Callable[[str], tuple[Path, ...]]) -> list[Path]:
    found = [folder / "lib" for folder in folders("mlx")]
    if backend == "cuda":
        # nvidia/<part>/lib up to CUDA 12, nvidia/cu13/lib since CUDA 13; bin on Windows.
        for folder in folders("nvidia"):
            found += sorted((*folder.glob("*/lib"), *folder.glob("*/bin")))
    return [folder for folder in found if folder.is_dir()]


def _prepend(environment: dict[str, str], variable: str, found: list[Path]) -> None:
    present = [folder for folder in environment.get(variable, "").split(os.pathsep) if folder]
    wanted = [str(folder) for folder in found if str(folder) not in present]
    if wanted:
        environment[variable] = os.pathsep.join([*wanted, *present])


def _point_at_cuda_headers(
    environment: dict[str, str], folders: Callable[[str], tuple[Path, ...]]
) -> None:
    """Set CUDA_HOME and CUDA_PATH for MLX's JIT compiler, which tries /usr/local/cuda last.

    The compiler searches ``include`` below each (mlx/backend/cuda/jit_module.cpp). It finds
    NVIDIA's packages only if they are installed next to MLX, and only in the layout it was built
    for (ml-explore/mlx#3995).
    """
    if environment.get("CUDA_HOME") or environment.get("CUDA_PATH"):
        return
    homes = [folder / part for folder in folders("nvidia") for part in ("cu13", "cuda_runtime")]
    for home in (*homes, _SYSTEM_CUDA):
        if (home / "include" / "cuda_runtime.h").is_file():
            environment["CUDA_HOME"] = environment["CUDA_PATH"] = str(home)
            return
