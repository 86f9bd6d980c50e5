"""What the doctor finds: every part that can be missing is a finding with advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.hostmemory import DeviceInfo, FreeMemory
from runner_client import doctor
from runner_client._blas import Blas
from runner_client._probe import ProbeResult, run_probe
from runner_client.doctor import Finding, examine

FACTS: dict[str, Any] = {
    "mlx_version": "0.32.4",
    "backend": "cpu",
    "device": {"architecture": "x86_64", "device_name": "Some CPU"},
    "compiler": "/usr/bin/g++",
    "kernels_compile": True,
    "blas": ["/usr/lib/libopenblas.so.0"],
    "gemm_gflops": 200.0,
    "errors": {},
}
STOCK = {**FACTS, "gemm_gflops": 4.0, "blas": ["/venv/libblas-1234.so.3"]}
OPENBLAS = Blas("OpenBLAS", Path("/usr/lib/libopenblas.so.0"))

Probe = Callable[[Mapping[str, str]], ProbeResult]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Linux CPU with everything installed; tests take parts away."""
    device = DeviceInfo("Some CPU", "cpu", 64 * 1024**3, 40 * 1024**3)
    free = FreeMemory(8 * 1024**3, "cgroup", 40 * 1024**3, 8 * 1024**3, None, "Some CPU", "cpu")
    monkeypatch.setattr(doctor, "installed_backend", lambda: "cpu")
    monkeypatch.setattr(doctor, "device_infos", lambda: (device,))
    monkeypatch.setattr(doctor, "free_memory", lambda: free)
    monkeypatch.setattr(doctor, "find_blas", lambda: OPENBLAS)
    monkeypatch.setattr(doctor, "package_folders", lambda _package: (Path("/here"),))
    monkeypatch.setattr(doctor, "child_environment", _environment)


def _environment(base: Mapping[str, str], *, backend: str, blas: str = "auto") -> dict[str, str]:
    return {**base, "BACKEND": backend, "BLAS": blas}


def probing(facts: Mapping[str, Any] = FACTS, stock: Mapping[str, Any] = STOCK) -> Probe:
    return lambda environment: ProbeResult(stock if environment["BLAS"] == "off" else facts)


def found(probe: Probe | None = None, missing: tuple[str, ...] = ()) -> dict[str, Finding]:
    """The findings by name, on a machine without some packages."""
    findings = examine(
        environ={},
        probe=probe or probing(),
        version=lambda name: None if name in missing else "1.2.3",
    )
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def test_healthy_machine_has_only_good_findings() -> None:
    findings = found()
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert {finding.advice for finding in findings.values()} == {""}
    assert set(findings) == {
        "Python", "platform", "grpcio", "protobuf", "server extra", "device 0", "free memory",
        "MLX", "kernel compilation", "BLAS",
    }  # fmt: skip


def test_blas_is_compared_with_mlx_alone() -> None:
    blas = found()["BLAS"]
    assert "200 GFLOP/s in float32, 50 times the 4.0" in blas.value
    assert "OpenBLAS" in blas.value


def test_memory_names_every_limit_and_the_one_that_binds() -> None:
    memory = found()["free memory"]
    assert memory.value == (
        "8.0 GiB, limited by cgroup (system 40.0 GiB, cgroup 8.0 GiB, device no limit)"
    )


def test_missing_blas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_blas", lambda: None)
    blas = found(probing(STOCK))["BLAS"]
    assert blas.status == "warning"
    assert "4.0 GFLOP/s" in blas.value
    assert "apt-get install libopenblas0-pthread" in blas.advice
    assert "pip install mkl intel-openmp" in blas.advice


def test_fast_blas_of_mlx_itself_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_blas", lambda: None)
    assert found(probing(FACTS, FACTS))["BLAS"].status == "ok"


def test_blas_without_effect_is_a_warning() -> None:
    blas = found(probing(STOCK, STOCK))["BLAS"]
    assert blas.status == "warning"
    assert "LD_PRELOAD" in blas.advice


def test_unmeasured_blas_is_a_warning() -> None:
    assert found(probing({**FACTS, "gemm_gflops": None}))["BLAS"].status == "warning"


@pytest.mark.parametrize(("compiler", "status"), [(None, "warning"), ("/usr/bin/g++", "error")])
def test_kernels_that_do_not_compile(compiler: str | None, status: str) -> None:
    facts = {
        **FACTS,
        "compiler": compiler,
        "kernels_compile": False,
        "errors": {"kernels_compile": "no kernel"},
    }
    kernels = found(probing(facts))["kernel compilation"]
    assert (kernels.status, kernels.value) == (status, "no kernel")
    assert "apt-get install g++" in kernels.advice


def test_cuda_kernels_that_do_not_compile_need_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_backend", lambda: "cuda")
    facts = {**FACTS, "backend": "cuda", "kernels_compile": False}
    findings = found(probing(facts))
    assert "nvidia-cuda-runtime" in findings["kernel compilation"].advice
    assert "BLAS" not in findings


def test_backend_other_than_the_installed_one_is_a_warning() -> None:
    mlx = found(probing({**FACTS, "backend": "metal"}))["MLX"]
    assert mlx.status == "warning"
    assert "cpu, cuda12 and cuda13" in mlx.advice


def test_failed_probe_is_a_finding_with_its_last_words() -> None:
    mlx = found(lambda _environment: ProbeResult(failure="exit code 1:\nImportError: libmlx"))[
        "MLX"
    ]
    assert mlx.status == "error"
    assert "ImportError: libmlx" in mlx.value


def test_missing_server_extra_is_said_and_nothing_is_probed() -> None:
    def never(_environment: Mapping[str, str]) -> ProbeResult:
        pytest.fail("probed without MLX")

    findings = found(never, missing=("mlx", "grpcio-status"))
    extra = findings["server extra"]
    assert (extra.status, extra.value) == ("error", "not installed: mlx, grpcio-status")
    assert "mlx-grpc-runner[cpu]" in extra.advice
    assert "MLX" not in findings


def test_missing_base_package_is_an_error() -> None:
    assert found(missing=("protobuf",))["protobuf"].status == "error"


def test_device_without_figures_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceInfo("unknown", "cuda", None, None, "nvidia-smi is not installed")
    monkeypatch.setattr(doctor, "device_infos", lambda: (device,))
    finding = found()["device 0"]
    assert (finding.status, finding.advice) == ("warning", "nvidia-smi is not installed")
    assert "unknown of unknown" in finding.value


def test_probe_that_fails_reports_the_end_of_its_stderr() -> None:
    script = "import sys; [print('line', n, file=sys.stderr) for n in range(99)]; sys.exit(3)"
    result = run_probe({}, arguments=("-c", script))
    assert result.failure.splitlines()[0] == "the probe ended with exit code 3:"
    assert result.failure.splitlines()[1:] == [f"line {n}" for n in range(94, 99)]
    assert result.facts == {}


@pytest.mark.parametrize("output", ["", "no json", "[1]"])
def test_probe_that_prints_no_object_has_failed(output: str) -> None:
    assert run_probe({}, arguments=("-c", f"print({output!r})")).failure


def test_probe_gets_the_environment() -> None:
    script = "import json, os; print(json.dumps({'seen': os.environ['MARK']}))"
    assert run_probe({"MARK": "here"}, arguments=("-c", script)).facts == {"seen": "here"}


def test_probe_that_hangs_is_ended() -> None:
    script = "import threading; threading.Event().wait()"
    result = run_probe({}, arguments=("-c", script), timeout_seconds=0.3)
    assert "timed out after 0.3 seconds" in result.failure
