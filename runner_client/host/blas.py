"""Discovery of a fast BLAS for MLX on a Linux CPU.

The CPU wheel of MLX bundles the reference BLAS. A fast library preloaded with ``LD_PRELOAD``
replaces it. Measured with mlx 0.32.4 on two cores of an AMD EPYC with AVX-512, on which some
other load was running, in float32, 512 x 4096 times 4096 x 1024:

======================================  =========
setting                                 GFLOP/s
======================================  =========
stock                                         3.6
OpenBLAS 0.3.21                               107
OpenBLAS 0.3.21, ``SKYLAKEX``             190-200
MKL 2026.2                                 70-105
======================================  =========

Another machine with the same CPU name reached 357 with and without ``SKYLAKEX``, 226 with
``HASWELL``, 190 with MKL and 2.7 with MLX's own, so only a measurement finds the fastest. MKL
chooses its slowest kernels on AMD; on Intel it comes close to OpenBLAS. OpenBLAS is therefore
preferred, and MKL, which needs no administrator to install, is the fallback, unless
``mlx-runner doctor`` has measured the fastest library on this machine (``blas_choice``).
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner_client.errors import InvalidRequestError
from runner_common.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

PRELOAD = "LD_PRELOAD"
CORETYPE = "OPENBLAS_CORETYPE"

_QUIET_THREADS = {"OPENBLAS_THREAD_TIMEOUT": "4"}
"""OpenBLAS threads wait for work by spinning, for 2^26 cycles by default, and take the processor
from MLX's own two threads. On two cores a decode step of 16 rows took 5.7 ms with the default
and 4.4 ms with this setting (2 M model); for one row of a 100 M model, 39 and 30 ms."""

_BLAS_WORDS = ("blas", "mkl", "blis", "nvpl")

# Fedora's plain libopenblas.so.0 is single-threaded; its threaded builds end in p and o.
_OPENBLAS = ("libopenblasp.so.0", "libopenblaso.so.0", "libopenblas.so.0")
_SYSTEM_FOLDERS = (
    "usr/local/lib",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
)

_AVX512 = frozenset(("avx512f", "avx512dq", "avx512bw", "avx512vl"))


@dataclass(frozen=True, slots=True)
class Blas:
    """A BLAS library to preload before MLX's own.

    Attributes:
        name: ``"OpenBLAS"``, ``"MKL"``, or the file's name.
        path: The shared library.
        env: Environment variables for the library, unless the user has set them.
    """

    name: str
    path: Path
    env: Mapping[str, str] = field(default_factory=dict)


def find_blas(*, root: Path = Path("/"), prefix: Path = Path(sys.prefix)) -> Blas | None:
    """Return the BLAS preferred by default on a Linux CPU; None if none is installed.

    Args:
        root: The directory that contains ``usr`` and ``proc``.
        prefix: The Python environment, where pip and conda install MKL and OpenBLAS.
    """
    return next(iter(installed_blas(root=root, prefix=prefix)), None)


def installed_blas(*, root: Path = Path("/"), prefix: Path = Path(sys.prefix)) -> tuple[Blas, ...]:
    """Return every BLAS suitable for preloading, in the default order of preference.

    A library reachable by several paths is listed once. The arguments are those of ``find_blas``.
    """
    folders = (prefix / "lib", *(root / folder for folder in _SYSTEM_FOLDERS))
    paths: dict[Path, Path] = {}
    for path in (*_openblas(folders), *_mkl(prefix / "lib")):
        if _can_be_preloaded(path):
            paths.setdefault(path.resolve(), path)
    return tuple(blas_at(path, root=root) for path in paths.values())


def variants(libraries: Iterable[Blas]) -> tuple[Blas, ...]:
    """Return each library with variables, followed by the same library without variables."""
    return tuple(
        variant
        for blas in libraries
        for variant in (blas, *((replace(blas, env={}),) if blas.env else ()))
    )


def blas_at(path: Path, *, root: Path = Path("/")) -> Blas:
    """Return the BLAS at a path.

    Raises:
        InvalidRequestError: The file does not exist, or its path cannot be preloaded.
    """
    path = path.expanduser().absolute()
    if not _can_be_preloaded(path):
        raise InvalidRequestError(
            f"{path} cannot be preloaded: LD_PRELOAD cannot express a blank or a colon in a "
            "path; link to the file from another folder",
            field_violations=[("blas", "a blank or a colon in the path")],
        )
    if not path.is_file():
        raise InvalidRequestError(
            f"no BLAS library at {path}; name a shared library, or 'auto' or 'off'",
            field_violations=[("blas", "no such file")],
        )
    if "openblas" in path.name:
        core = _openblas_core(root)
        return Blas("OpenBLAS", path, {CORETYPE: core} if core else {})
    return Blas("MKL" if "mkl" in path.name else path.name, path)


def has_blas_in_front(environment: Mapping[str, str]) -> bool:
    """Return whether a BLAS is already preloaded."""
    preloaded = environment.get(PRELOAD, "").lower()
    return any(word in preloaded for word in _BLAS_WORDS)


def in_front(environment: Mapping[str, str], blas: Blas) -> dict[str, str]:
    """Return the environment with the BLAS preloaded after other preloaded libraries.

    A BLAS that is already preloaded is the user's choice and leaves the environment unchanged.
    """
    preloaded = environment.get(PRELOAD, "")
    if has_blas_in_front(environment):
        return dict(environment)
    libraries = [preloaded, str(blas.path)] if preloaded else [str(blas.path)]
    threads = _QUIET_THREADS if blas.name == "OpenBLAS" else _limited_threads()
    return {**threads, **blas.env, **environment, PRELOAD: ":".join(libraries)}


def _limited_threads() -> dict[str, str]:
    """Return the variable to keep MKL and others within a CPU quota.

    OpenBLAS is limited by the runner, which knows how many threads a model can use.
    """
    cores = usable_cores()
    return {"OMP_NUM_THREADS": str(cores.count)} if cores.count < cores.schedulable else {}


def _can_be_preloaded(path: Path) -> bool:
    return not set(str(path)) & set(" \t\n:")


def _openblas(folders: tuple[Path, ...]) -> Iterator[Path]:
    for folder in folders:
        yield from (folder / name for name in _OPENBLAS if (folder / name).is_file())


def _mkl(folder: Path) -> Iterator[Path]:
    # MKL ends the process at the first call if Intel's OpenMP is not beside it.
    if (folder / "libiomp5.so").is_file():
        yield from sorted(folder.glob("libmkl_rt.so*"), reverse=True)


def _openblas_core(root: Path) -> str | None:
    """Return the kernels for OpenBLAS to use, by the CPU's features.

    A build older than the CPU falls back to slower kernels (0.3.21 of Debian 12 to half the speed
    on the CPU above). A build that knows the CPU chooses float32 kernels of the same family.
    """
    flags = _cpu_flags(root)
    if flags >= _AVX512:
        return "SKYLAKEX"
    return "HASWELL" if {"avx2", "fma"} <= flags else None


def _cpu_flags(root: Path) -> frozenset[str]:
    return frozenset(cpu_facts(root).get("flags", "").split())


def cpu_facts(root: Path = Path("/")) -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty if unavailable."""
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            # One block for each processor, followed by an empty line.
            block = tuple(itertools.takewhile(str.strip, lines))
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block)
    return {name.strip(): value.strip() for name, _, value in pairs}
