"""The findings of ``doctor``, with advice about each missing part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from runner_client.host import blas_choice, doctor
from runner_client.host.blas import Blas
from runner_client.host.blas_choice import Choice
from runner_client.host.doctor import Finding, examine
from runner_client.host.machine_load import CpuClock, OtherLoad, cpu_clock
from runner_client.host.probe import ProbeResult, run_probe
from runner_common.cores import Cores
from runner_common.host_memory.free import DeviceInfo, FreeMemory

FACTS: dict[str, Any] = {
    "mlx_version": "0.32.4",
    "backend": "cpu",
    "device": {"architecture": "x86_64", "device_name": "Some CPU"},
    "compiler": "/usr/bin/g++",
    "kernels_compile": None,
    "blas": "OpenBLAS (libopenblas.so.0)",
    "gemm_gflops": 200.0,
    "errors": {},
}
STOCK = {**FACTS, "gemm_gflops": 4.0, "blas": "reference BLAS of MLX"}
OPENBLAS = Blas("OpenBLAS", Path("/usr/lib/libopenblas.so.0"))
MKL = Blas("MKL", Path("/venv/lib/libmkl_rt.so.3"))

Probe = Callable[[Mapping[str, str]], ProbeResult]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake a Linux CPU machine with everything installed; tests remove parts."""
    device = DeviceInfo("Some CPU", "cpu", 64 * 1024**3, 40 * 1024**3)
    free = FreeMemory(8 * 1024**3, "cgroup", 40 * 1024**3, 8 * 1024**3, None, "Some CPU", "cpu")
    monkeypatch.setattr(doctor, "installed_backend", lambda: "cpu")
    monkeypatch.setattr(doctor, "device_infos", lambda: (device,))
    monkeypatch.setattr(doctor, "free_memory", lambda: free)
    monkeypatch.setattr(doctor, "installed_blas", lambda: (OPENBLAS,))
    monkeypatch.setattr(doctor, "remember", _remember)
    monkeypatch.setattr(doctor, "package_folders", lambda _package: (Path("/here"),))
    monkeypatch.setattr(doctor, "child_environment", _environment)
    monkeypatch.setattr(doctor, "cpu_clock", lambda: CpuClock(0.0, 0.0, 0.0, 2))
    monkeypatch.setattr(doctor, "usable_cores", lambda: Cores(2, 2))


def _remember(_environ: Mapping[str, str], choice: Choice, libraries: Sequence[Blas]) -> Path:
    assert choice.blas is None or choice.blas in libraries
    return Path("/cache/blas.json")


def _environment(base: Mapping[str, str], *, backend: str, blas: str = "auto") -> dict[str, str]:
    return {**base, "BACKEND": backend, "BLAS": blas}


def probing(facts: Mapping[str, Any] = FACTS, stock: Mapping[str, Any] = STOCK) -> Probe:
    return lambda environment: ProbeResult(facts if environment.get("LD_PRELOAD") else stock)


def compiling(_environment: Mapping[str, str]) -> ProbeResult:
    return ProbeResult({**FACTS, "kernels_compile": True, "gemm_gflops": None})


def found(
    probe: Probe | None = None, missing: tuple[str, ...] = (), kernels: Probe = compiling
) -> dict[str, Finding]:
    """Return the findings by name, with some packages missing."""
    findings = examine(
        environ={},
        probe=probe or probing(),
        kernels_probe=kernels,
        version=lambda name: None if name in missing else "1.2.3",
    )
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def test_a_healthy_machine_has_only_good_findings() -> None:
    findings = found()
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert {finding.advice for finding in findings.values()} == {""}
    assert set(findings) == {
        "Python", "platform", "processor cores", "grpcio", "protobuf", "server extra", "device 0",
        "free memory", "MLX", "kernel compilation", "BLAS", "BLAS choice", "other load",
        "weights",
    }  # fmt: skip


def test_the_blas_is_compared_with_mlx_alone() -> None:
    blas, *rows = found()["BLAS"].value.splitlines()
    assert blas == (
        "OpenBLAS (libopenblas.so.0): 200.0 GFLOP/s in float32, 50 times the 4.0 of MLX's own"
    )
    assert rows == [
        "OpenBLAS     200.0 GFLOP/s  /usr/lib/libopenblas.so.0",
        "MLX's own      4.0 GFLOP/s",
    ]


def test_the_fastest_blas_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_blas", lambda: (OPENBLAS, MKL))
    figures = {str(OPENBLAS.path): 200.0, str(MKL.path): 300.0, "": 4.0}

    def probe(environment: Mapping[str, str]) -> ProbeResult:
        library = environment.get("LD_PRELOAD", "")
        return ProbeResult({**FACTS, "blas": library, "gemm_gflops": figures[library]})

    findings = found(probe)
    assert findings["BLAS"].value.startswith(f"{MKL.path}: 300.0 GFLOP/s in float32, 75 times")
    assert findings["BLAS choice"].value == "MKL, remembered in /cache/blas.json"
    figures[""] = 500.0
    assert found(probe)["BLAS choice"].value == "MLX's own, remembered in /cache/blas.json"


def test_the_choice_is_written_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Blas("OpenBLAS", tmp_path / "libopenblas.so.0")
    library.path.touch()
    monkeypatch.setattr(doctor, "installed_blas", lambda: (library,))
    monkeypatch.setattr(doctor, "remember", blas_choice.remember)
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    examine(
        environ=environ,
        probe=probing(),
        kernels_probe=compiling,
        version=lambda _name: "1.2.3",
    )
    assert blas_choice.recall(environ, (library,)) == Choice(library)


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "remember", Mock(side_effect=PermissionError("read-only")))
    choice = found()["BLAS choice"]
    assert (choice.status, choice.value) == ("warning", "not remembered: read-only")
    assert "--blas PATH" in choice.advice


def test_a_crashing_blas_is_shown_and_not_chosen() -> None:
    def probe(environment: Mapping[str, str]) -> ProbeResult:
        if environment.get("LD_PRELOAD"):
            return ProbeResult(failure="the probe ended with exit code -4:")
        return ProbeResult(STOCK)

    findings = found(probe)
    assert findings["MLX"].status == "ok"
    assert findings["BLAS"].status == "warning"
    assert "OpenBLAS      not measured  the probe ended with exit code -4:" in (
        findings["BLAS"].value
    )
    assert findings["BLAS choice"].value.startswith("MLX's own, remembered")


@pytest.mark.parametrize(("gflops", "status"), [(200.0, "ok"), (4.0, "warning")])
def test_a_blas_preloaded_by_the_user_is_kept(gflops: float, status: str) -> None:
    findings = {
        finding.name: finding
        for finding in examine(
            environ={"LD_PRELOAD": "/opt/libmkl_rt.so.2"},
            probe=probing({**FACTS, "blas": "MKL (libmkl_rt.so.2)", "gemm_gflops": gflops}),
            kernels_probe=compiling,
            version=lambda _name: "1.2.3",
        )
    }
    blas = findings["BLAS"]
    assert blas.status == status
    assert blas.value == f"MKL (libmkl_rt.so.2), from LD_PRELOAD: {gflops} GFLOP/s in float32"
    assert ("unset LD_PRELOAD" in blas.advice) == (status == "warning")
    assert "BLAS choice" not in findings


def test_memory_names_every_limit_and_the_smallest() -> None:
    memory = found()["free memory"]
    assert memory.value == (
        "8.0 GiB, limited by cgroup (system 40.0 GiB, cgroup 8.0 GiB, device no limit)"
    )


def test_numbers_are_facts_for_programs() -> None:
    findings = found()
    assert findings["processor cores"].facts == {"count": 2, "schedulable": 2, "group": ""}
    assert findings["grpcio"].facts == {"version": "1.2.3"}
    assert findings["device 0"].facts["free_bytes"] == 40 * 1024**3
    assert findings["free memory"].facts == {
        "system_bytes": 40 * 1024**3,
        "cgroup_bytes": 8 * 1024**3,
        "device_bytes": None,
        "available_bytes": 8 * 1024**3,
        "source": "cgroup",
    }
    assert findings["MLX"].facts == {"version": "0.32.4", "backend": "cpu", "device": "Some CPU"}
    assert findings["BLAS"].facts["measured"] == [
        {"name": "OpenBLAS", "path": "/usr/lib/libopenblas.so.0", "gflops": 200.0},
        {"name": "MLX's own", "path": None, "gflops": 4.0},
    ]


@pytest.mark.parametrize(
    ("busy", "own", "status"), [(20.0, 19.0, "ok"), (20.0, 10.0, "warning"), (3.0, 4.0, "ok")]
)
def test_a_measurement_under_load_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, busy: float, own: float, status: str
) -> None:
    clocks = iter([CpuClock(100.0, 50.0, 5.0, 2), CpuClock(110.0, 50.0 + busy, 5.0 + own, 2)])
    monkeypatch.setattr(doctor, "cpu_clock", lambda: next(clocks))
    load = found()["other load"]
    others = max(0.0, busy - own) / 10
    assert (load.status, load.facts) == (status, {"busy_cores": others, "cores": 2})
    assert load.value == f"{others:.1f} of 2 cores busy with other processes"
    assert ("run mlx-runner doctor again" in load.advice) is (status == "warning")


def test_load_on_cores_beyond_a_quota_does_not_disturb() -> None:
    assert not OtherLoad(busy_cores=30.0, cores=64).disturbs(2)
    assert OtherLoad(busy_cores=63.0, cores=64).disturbs(2)


def test_the_clock_counts_this_process_among_the_busy_time() -> None:
    before = cpu_clock()
    while cpu_clock().own_seconds < before.own_seconds + 0.1:
        pass
    after = cpu_clock()
    assert after.wall_seconds > before.wall_seconds
    assert after.busy_seconds > before.busy_seconds


def test_each_step_is_told_before_it() -> None:
    steps: list[str] = []
    examine(
        environ={},
        probe=probing(),
        kernels_probe=compiling,
        version=lambda _name: "1.2.3",
        progress=steps.append,
    )
    assert steps == [
        "examining this machine",
        "measuring OpenBLAS (1 of 2)",
        "measuring MLX's own (2 of 2)",
        "measuring OpenBLAS again",
        "compiling a kernel",
    ]


def test_a_missing_blas_has_advice_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_blas", lambda: ())
    blas = found(probing(STOCK))["BLAS"]
    assert blas.value == "reference BLAS of MLX: 4.0 GFLOP/s in float32"
    assert blas.status == "warning"
    assert "apt-get install libopenblas0-pthread" in blas.advice
    assert "pip install mkl intel-openmp" in blas.advice


def test_a_fast_blas_of_mlx_itself_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_blas", lambda: ())
    assert found(probing(FACTS, FACTS))["BLAS"].status == "ok"


def test_a_blas_without_effect_is_a_warning() -> None:
    blas = found(probing(STOCK, STOCK))["BLAS"]
    assert blas.status == "warning"
    assert blas.value.startswith("reference BLAS of MLX: 4.0 GFLOP/s in float32, 1 times")


def test_a_blas_that_helps_a_slow_machine_is_ok() -> None:
    assert found(probing({**FACTS, "gemm_gflops": 12.0}))["BLAS"].status == "ok"


def test_a_blas_as_fast_as_a_fast_one_of_mlx_is_ok() -> None:
    assert found(probing(FACTS, {**FACTS, "gemm_gflops": 190.0}))["BLAS"].status == "ok"


def test_an_unmeasured_blas_is_a_warning() -> None:
    unmeasured = {**FACTS, "gemm_gflops": None}
    findings = found(probing(unmeasured, unmeasured))
    assert findings["BLAS"].status == "warning"
    assert findings["BLAS"].value.startswith("speed not measured")
    assert "BLAS choice" not in findings


@pytest.mark.parametrize("compiler", [None, "/usr/bin/g++"])
def test_kernels_that_do_not_compile_are_a_warning(compiler: str | None) -> None:
    """Fusing is optional, so this is a warning and not an error."""
    facts = {
        **FACTS,
        "compiler": compiler,
        "kernels_compile": False,
        "errors": {"kernels_compile": "no kernel"},
    }
    kernels = found(kernels=lambda _environment: ProbeResult(facts))["kernel compilation"]
    assert (kernels.status, kernels.value) == ("warning", "no kernel")
    assert "apt-get install g++" in kernels.advice
    assert (compiler is not None) is ("does not work" in kernels.advice)


def test_a_compilation_that_kills_the_probe_is_a_warning() -> None:
    findings = found(kernels=lambda _environment: ProbeResult(failure="exit code -11:\nSegfault"))
    kernels = findings["kernel compilation"]
    assert (kernels.status, kernels.value) == ("warning", "exit code -11:\nSegfault")
    assert findings["MLX"].status == "ok"


def test_kernels_are_compiled_once_with_the_fastest_blas() -> None:
    environments = []

    def compile_in(environment: Mapping[str, str]) -> ProbeResult:
        environments.append(environment.get("LD_PRELOAD"))
        return compiling(environment)

    found(kernels=compile_in)
    assert environments == [str(OPENBLAS.path)]


def test_cuda_kernels_that_do_not_compile_need_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_backend", lambda: "cuda")
    facts = {**FACTS, "backend": "cuda", "kernels_compile": False}
    findings = found(probing(facts, facts), kernels=probing(facts, facts))
    assert "nvidia-cuda-runtime" in findings["kernel compilation"].advice
    assert not {"BLAS", "BLAS choice", "weights"} & set(findings)


def test_a_backend_other_than_the_installed_one_is_a_warning() -> None:
    mlx = found(probing({**FACTS, "backend": "metal"}))["MLX"]
    assert mlx.status == "warning"
    assert "cpu, cuda12 and cuda13" in mlx.advice


def test_a_failed_probe_is_a_finding_with_its_last_lines() -> None:
    mlx = found(lambda _environment: ProbeResult(failure="exit code 1:\nImportError: libmlx"))[
        "MLX"
    ]
    assert mlx.status == "error"
    assert "ImportError: libmlx" in mlx.value


def test_a_missing_server_extra_is_reported_without_a_probe() -> None:
    def never(_environment: Mapping[str, str]) -> ProbeResult:
        pytest.fail("probed without MLX")

    findings = found(never, missing=("mlx", "grpcio-status"))
    extra = findings["server extra"]
    assert (extra.status, extra.value) == ("error", "not installed: mlx, grpcio-status")
    assert "pip install '.[cpu]'" in extra.advice
    assert "MLX" not in findings


def test_a_missing_base_package_is_an_error() -> None:
    assert found(missing=("protobuf",))["protobuf"].status == "error"


def test_a_device_without_figures_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceInfo("unknown", "cuda", None, None, "nvidia-smi is not installed")
    monkeypatch.setattr(doctor, "device_infos", lambda: (device,))
    finding = found()["device 0"]
    assert (finding.status, finding.advice) == ("warning", "nvidia-smi is not installed")
    assert "unknown of unknown" in finding.value


def test_a_failing_probe_reports_the_end_of_its_stderr() -> None:
    script = "import sys; [print('line', n, file=sys.stderr) for n in range(99)]; sys.exit(3)"
    result = run_probe({}, arguments=("-c", script))
    assert result.failure.splitlines()[0] == "the probe ended with exit code 3:"
    assert result.failure.splitlines()[1:] == [f"line {n}" for n in range(94, 99)]
    assert result.facts == {}


@pytest.mark.parametrize("output", ["", "no json", "[1]"])
def test_a_probe_without_a_json_object_has_failed(output: str) -> None:
    assert run_probe({}, arguments=("-c", f"print({output!r})")).failure


def test_the_probe_gets_the_environment() -> None:
    script = "import json, os; print(json.dumps({'seen': os.environ['MARK']}))"
    assert run_probe({"MARK": "here"}, arguments=("-c", script)).facts == {"seen": "here"}


def test_a_hanging_probe_is_killed() -> None:
    script = "import threading; threading.Event().wait()"
    result = run_probe({}, arguments=("-c", script), timeout_seconds=0.3)
    assert "timed out after 0.3 seconds" in result.failure
