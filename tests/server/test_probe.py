"""The probe prints the facts about MLX on this machine as one JSON object."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from runner_client.host.environment import child_environment, find_blas
from runner_client.host.probe import run_kernels_probe, run_probe

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

KEYS = {
    "python", "platform", "mlx_version", "mlx_lm_version", "backend", "device", "compiler",
    "kernels_compile", "blas", "gemm_gflops", "errors",
}  # fmt: skip


def test_the_probe_prints_every_fact_in_one_object() -> None:
    result = run_probe(os.environ)
    assert result.failure == ""
    assert set(result.facts) == KEYS
    assert result.facts["mlx_version"] == metadata.version("mlx")
    assert result.facts["backend"] in {"cpu", "metal", "cuda"}
    assert result.facts["gemm_gflops"] > 0.1
    assert result.facts["kernels_compile"] is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_kernel_is_compiled_if_asked() -> None:
    result = run_kernels_probe(os.environ)
    assert result.failure == ""
    assert set(result.facts) == KEYS
    assert result.facts["kernels_compile"] is True
    assert result.facts["gemm_gflops"] is None


@pytest.mark.skipif(find_blas() is None, reason="no fast BLAS is installed")
def test_a_preloaded_blas_is_named_and_faster(tmp_path: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    plain["XDG_CACHE_HOME"] = str(tmp_path)  # an empty cache of measurements
    stock = run_probe(child_environment(plain, backend="cpu", blas="off"))
    if stock.facts["backend"] != "cpu":
        pytest.skip("MLX does not run on the CPU here")
    fast_environment = child_environment(plain, backend="cpu")
    fast = run_probe(fast_environment)
    assert stock.facts["blas"] == "reference BLAS of MLX"
    assert Path(fast_environment["LD_PRELOAD"]).name in fast.facts["blas"]
    # On an idle machine the factor is 30 or more; a busy one gets less.
    assert fast.facts["gemm_gflops"] > 2 * stock.facts["gemm_gflops"]


@pytest.mark.skipif(find_blas() is None, reason="no fast BLAS is installed")
def test_a_missing_blas_is_not_named(tmp_path: Path) -> None:
    """Name the loaded library, whatever LD_PRELOAD says."""
    gone = tmp_path / "libopenblas.so.0"
    environment = {**os.environ, "LD_PRELOAD": str(gone)}
    result = run_probe(environment, arguments=("-P", "-m", "runner_server.mlx_backend.probe"))
    if result.facts["backend"] != "cpu":
        pytest.skip("MLX does not run on the CPU here")
    assert str(gone) not in (result.facts["blas"] or "")
    assert not (result.facts["blas"] or "").startswith("OpenBLAS (libopenblas.so.0)")


def test_a_missing_compiler_is_reported(tmp_path: os.PathLike[str]) -> None:
    result = run_kernels_probe({**os.environ, "PATH": str(tmp_path)})
    if result.facts["backend"] != "cpu":
        pytest.skip("only MLX on the CPU compiles with g++")
    assert result.facts["compiler"] is None
    assert result.facts["kernels_compile"] is False
    assert "built no kernel" in result.facts["errors"]["kernels_compile"]
