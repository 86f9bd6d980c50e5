"""Name of the library for matrix products."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner_server.host import blas
from support.harness import Server


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("/usr/lib/x86_64-linux-gnu/libopenblas.so.0", "OpenBLAS (libopenblas.so.0)"),
        ("/usr/lib/openblas-pthread/libblas.so.3", "OpenBLAS (libblas.so.3)"),
        (
            "/v/lib/python3/site-packages/mlx_cpu.libs/libopenblas-1a.so",
            "OpenBLAS (libopenblas-1a.so)",
        ),
        ("/venv/lib/libmkl_rt.so.3", "MKL (libmkl_rt.so.3)"),
        ("/usr/lib/blis/libblas.so.3", "BLIS (libblas.so.3)"),
        ("/opt/libnvpl_blas_lp64_gomp.so.0", "NVPL (libnvpl_blas_lp64_gomp.so.0)"),
        ("/opt/libarmpl_lp64_mp.so", "Arm Performance Libraries (libarmpl_lp64_mp.so)"),
        ("/v/site-packages/mlx/lib/../../mlx_cpu.libs/libblas-bd8a.so.3", blas.REFERENCE),
        ("/v/site-packages/mlx/lib/libmlx.so", blas.REFERENCE),
        ("/usr/lib/x86_64-linux-gnu/libblas.so.3.11", "BLAS (libblas.so.3.11)"),
    ],
)
def test_the_name_comes_from_the_path_of_the_library(library: str, name: str) -> None:
    assert blas.blas_name(Path(library)) == name


def test_a_link_is_named_after_its_target(tmp_path: Path) -> None:
    real = tmp_path / "libopenblasp-r0.3.21.so"
    real.touch()
    link = tmp_path / "libblas.so.3"
    link.symlink_to(real)
    assert blas.blas_name(link) == "OpenBLAS (libblas.so.3)"


@pytest.mark.parametrize("device", ["", "gpu: Apple M3 Max"])
def test_only_a_cpu_has_a_blas(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_blas_in_use", lambda: pytest.fail("looked at"))
    assert blas.blas_of(device) == ""


def test_the_name_is_empty_before_mlx_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    assert blas.blas_of("cpu: EPYC") == ""


async def test_status_names_the_blas(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await server.load()
    monkeypatch.setattr("runner_server.api.service.blas_of", "the BLAS of {}".format)
    assert (await server.status()).blas == "the BLAS of cpu: fake"
