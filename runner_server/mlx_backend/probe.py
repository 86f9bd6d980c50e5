"""Describes MLX on this machine as one JSON object on stdout.

``mlx-runner doctor`` runs ``python -m runner_server.mlx_backend.probe [--gemm] [--kernels]`` in the
environment that a runner would get, so that the results apply to a runner. Every key is always
present. A value that could not be determined is null, with the reason in ``errors``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from importlib import metadata
from typing import Any

import mlx.core as mx

from runner_common.signals import reset_inherited_signals
from runner_server.host.blas import blas_of
from runner_server.host.compiler import CHECK_LIBRARY, CompilerError
from runner_server.host.kernel_folder import NoKernelFolderError
from runner_server.mlx_backend.blas_threads import limit_threads
from runner_server.mlx_backend.fusing import kernels_of_this_run

_GEMM_ROWS, _GEMM_DEPTH, _GEMM_COLUMNS = 512, 4096, 1024
_GEMM_SECONDS = 0.3  # six of 50 ms each with a fast BLAS on two cores
_FEW_ROWS, _FEW_SECONDS = 32, 0.1
"""First measurement. The reference BLAS multiplies as many numbers a second with few rows as with
all, and takes 2 s for all once. A fast one has many tries, so that other load does not decide."""


def probe(*, gemm: bool = False, kernels: bool = False) -> dict[str, Any]:
    """Return the properties of MLX in this process.

    Args:
        gemm: Whether to measure float32 matrix multiplication, for about half a second.
        kernels: Whether to compile a fused kernel.
    """
    errors: dict[str, str] = {}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "mlx_version": _version("mlx"),
        "mlx_lm_version": _version("mlx-lm"),
        "backend": _backend(),
        "device": _device(errors),
        "compiler": shutil.which("g++"),
        "kernels_compile": _kernels_compile(errors) if kernels else None,
        "blas": blas_of(_backend()) or None,
        "gemm_gflops": _gemm_gflops(errors) if gemm else None,
        "errors": errors,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _backend() -> str:
    if mx.metal.is_available():
        return "metal"
    return "cpu" if mx.default_device() == mx.Device(mx.cpu) else "cuda"


def _device(errors: dict[str, str]) -> dict[str, Any] | None:
    try:
        return dict(mx.device_info())
    except RuntimeError as error:
        errors["device"] = str(error)
        return None


def _kernels_compile(errors: dict[str, str]) -> bool:
    """Return whether MLX compiles and runs a fused kernel.

    An empty folder ensures that a CPU kernel is compiled, and shows that it was. Otherwise the
    result could come from an earlier run, or from unfused operations: MLX runs those without g++.
    """
    try:
        with kernels_of_this_run(checks=True) as folder:
            fused = mx.compile(lambda x: mx.exp(x) * 2 + mx.sin(x))
            mx.eval(fused(mx.array([0.0, 1.0])))
            built = {file.name for file in folder.glob("*.so")} - {CHECK_LIBRARY}
    except (NoKernelFolderError, CompilerError, RuntimeError) as error:
        errors["kernels_compile"] = str(error)
        return False
    if _backend() == "cpu" and not built:
        errors["kernels_compile"] = "MLX built no kernel and ran the operations one by one"
        return False
    return True


def _gemm_gflops(errors: dict[str, str]) -> float | None:
    """Return the GFLOP/s of the fastest multiplication in 0.3 s.

    The speed with few rows is returned if all rows would take longer than that.
    """
    limit_threads()
    try:
        left = mx.random.normal((_GEMM_ROWS, _GEMM_DEPTH))
        right = mx.random.normal((_GEMM_COLUMNS, _GEMM_DEPTH)).T  # as in a linear layer
        few = left[:_FEW_ROWS]
        mx.eval(left, few, right)
        speed = _best_gflops(few, right, _FEW_SECONDS)
        if 2 * left.size * _GEMM_COLUMNS / speed / 1e9 < _GEMM_SECONDS:
            speed = _best_gflops(left, right, _GEMM_SECONDS)
    except RuntimeError as error:
        errors["gemm_gflops"] = str(error)
        return None
    return speed


def _best_gflops(left: mx.array, right: mx.array, seconds: float) -> float:
    """Multiply for some time, but at least once."""
    best, begin = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        mx.eval(left @ right)
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begin >= seconds:
            return 2 * left.size * _GEMM_COLUMNS / best / 1e9


def main() -> int:
    """Print the results as one line of JSON."""
    reset_inherited_signals()
    parser = argparse.ArgumentParser(
        prog="python -m runner_server.mlx_backend.probe", description=__doc__
    )
    parser.add_argument("--gemm", action="store_true", help="measure float32 GEMM as well")
    parser.add_argument("--kernels", action="store_true", help="compile a fused kernel as well")
    arguments = parser.parse_args()
    sys.stdout.write(json.dumps(probe(**vars(arguments))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
