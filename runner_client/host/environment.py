"""The environment of a runner process: what MLX needs to find, and a fast BLAS.

The parent prepares it, because a process cannot change what it preloads after
its start.
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
    """Where a top-level package lies, without importing it; empty if it is not installed."""
    spec = importlib.util.find_spec(package)
    return tuple(Path(place) for place in (spec and spec.submodule_search_locations) or ())


def child_environment(
    base: Mapping[str, str],
    *,
    backend: Backend,
    blas: str = "auto",
    system: str = sys.platform,
    folders: Callable[[str], tuple[Path, ...]] = package_folders,
    find: Callable[[Mapping[str, str]], Blas | None] = choose_blas,
) -> dict[str, str]:
    """The environment to start a runner with.

    * Linux: ``LD_LIBRARY_PATH`` begins with the library folders of MLX and, for
      CUDA, of NVIDIA's packages; on Windows ``PATH`` does.
    * CUDA: ``CUDA_HOME`` and ``CUDA_PATH`` name the headers MLX compiles kernels
      with, unless one of them is set.
    * Linux CPU: ``LD_PRELOAD`` ends with a fast BLAS, where one is installed and
      none is preloaded yet: the one that ``mlx-runner doctor`` has found fastest here,
      or if it has not measured yet OpenBLAS before MKL.

    Everything else of ``base`` is kept. Not measured on CUDA or Windows.

    Args:
        base: The environment to start from, usually ``os.environ``.
        backend: What MLX runs on.
        blas: ``"auto"``, ``"off"``, or the path of a shared library.
        system: ``sys.platform`` of the machine.
        folders: Where a package lies.
        find: Finds the BLAS for ``"auto"``, for a runner of that environment.

    Raises:
        InvalidRequestError: ``blas`` is the path of no file.
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
        # nvidia/<part>/lib up to CUDA 12, nvidia/cu13/lib since; bin on Windows.
        for folder in folders("nvidia"):
            found += sorted((*folder.glob("*/lib"), *folder.glob("*/bin")))
    return [folder for folder in found if folder.is_dir()]


def _prepend(environment: dict[str, str], variable: str, found: list[Path]) -> None:
    present = [place for place in environment.get(variable, "").split(os.pathsep) if place]
    wanted = [str(folder) for folder in found if str(folder) not in present]
    if wanted:
        environment[variable] = os.pathsep.join([*wanted, *present])


def _point_at_cuda_headers(
    environment: dict[str, str], folders: Callable[[str], tuple[Path, ...]]
) -> None:
    """Sets what MLX's JIT compiler reads: CUDA_HOME, then CUDA_PATH, then /usr/local/cuda.

    It searches ``include`` below them (mlx/backend/cuda/jit_module.cpp). It finds
    NVIDIA's packages by itself only where they lie beside its own, and only in
    the layout it was built for (ml-explore/mlx#3995).
    """
    if environment.get("CUDA_HOME") or environment.get("CUDA_PATH"):
        return
    homes = [folder / part for folder in folders("nvidia") for part in ("cu13", "cuda_runtime")]
    for home in (*homes, _SYSTEM_CUDA):
        if (home / "include" / "cuda_runtime.h").is_file():
            environment["CUDA_HOME"] = environment["CUDA_PATH"] = str(home)
            return
