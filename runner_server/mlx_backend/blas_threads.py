"""Number of threads for matrix products on a CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

import mlx.core as mx

from runner_common.cores import usable_cores

_SMALL_MATRIX = 128 * 1024
"""Mean elements per matrix up to which one thread is faster than two that must synchronize: with
one, a decode step of 16 rows took 3.6 ms instead of 4.6 on a 2 M model (68,000 per matrix); a 20 M
model (1,300,000) was faster with two. OpenBLAS 0.3.21, two cores."""

_CHOSEN_BY_USER = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS")


def fit_threads(weights: Iterable[mx.array]) -> None:
    """Set OpenBLAS to one thread for a model of small matrices, otherwise to one per core.

    No-op if another BLAS is in use, or if the environment sets the number.
    """
    sizes = [value.size for value in weights if value.ndim > 1]
    is_small = sum(sizes) <= _SMALL_MATRIX * len(sizes)
    limit_threads(1 if is_small else None)


def limit_threads(count: int | None = None) -> None:
    """Set OpenBLAS's number of threads, by default one per usable core.

    OpenBLAS itself respects CPU affinity but not CPU quotas. No-op if another BLAS is in use, or if
    the environment sets the number.
    """
    blas = ctypes.CDLL(None)
    if hasattr(blas, "openblas_set_num_threads") and not any(map(os.getenv, _CHOSEN_BY_USER)):
        most = min(blas.openblas_get_num_procs(), usable_cores().count)
        blas.openblas_set_num_threads(count or most)
