"""Description of a machine, as results of the benchmark have it."""

from __future__ import annotations

from typing import Any

ABOUT: dict[str, Any] = {
    "time": "2026-01-02T03:04+00:00",
    "commit": "abc1234",
    "cpu": "A CPU",
    "cores": 2,
    "memory_bytes": 8 * 2**30,
    "os": "An OS",
    "python": "3.11.0",
    "blas": "FastBLAS (libfast.so)",
    "gemm_gflops": 200.0,
    "gemm_gflops_stock": None,
    "packages": {"mlx": "0.32"},
    "smg_packages": {"mlx-lm": "0.31"},
}
