"""Diagnosis of this machine for a runner: findings, measurements and advice.

This module returns findings as data; ``mlx-runner doctor`` prints them. MLX is queried in a
child process with the environment of a runner, so that a machine on which MLX crashes yields
a finding too.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from runner_client.errors import RunnerError
from runner_client.host.blas import has_blas_in_front, installed_blas
from runner_client.host.blas_choice import Choice, remember
from runner_client.host.blas_measure import measure, table
from runner_client.host.command import check_platform
from runner_client.host.environment import child_environment, find_blas, package_folders
from runner_client.host.machine_load import OtherLoad, cpu_clock
from runner_client.host.probe import ProbeResult, run_kernels_probe, run_probe
from runner_common.cores import usable_cores
from runner_common.extras import install_advice
from runner_common.host_memory.free import FreeMemory, device_infos, free_memory, installed_backend
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from runner_client.host.blas_measure import Measurement
    from runner_client.host.environment import Blas
    from runner_common.cores import Cores
    from runner_common.host_memory.free import Backend

Level = Literal["ok", "warning", "error"]

_FAST_RATIO = 2.0
_FAST_GFLOPS = 20.0

_SERVER_PACKAGES = (
    "mlx",
    "mlx-lm",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
)
_INSTALL_SERVER = (
    f"{install_advice('cpu')} on Linux (or cuda12, cuda13), with server on macOS; not needed by a "
    "client of a runner on another machine"
)
_INSTALL_BLAS = (
    "install a fast BLAS: apt-get install libopenblas0-pthread (Debian, Ubuntu), or without "
    "administrator rights pip install mkl intel-openmp; it is found automatically"
)
_CPU_WEIGHTS = (
    "held as float32 where memory allows, quantized ones dequantized: no other format is fast on "
    "a CPU (--dtype as_stored keeps the stored format)"
)
_BUSY = (
    "the speeds are too low, and another BLAS may be faster: run mlx-runner doctor again when the "
    "machine has nothing else to do"
)
_INSTALL_COMPILER = "install a C++ compiler that MLX can call as g++: apt-get install g++"


def missing() -> tuple[str, ...]:
    """Return advice on software missing for full speed on a Linux CPU, with install commands.

    Does not measure anything; ``examine`` does.
    """
    if sys.platform != "linux" or installed_backend() != "cpu":
        return ()
    advice = []
    if find_blas() is None:
        advice.append(_INSTALL_BLAS)
    if shutil.which("g++") is None:
        advice.append(_INSTALL_COMPILER)
    return tuple(advice)


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of the diagnosis.

    Attributes:
        name: The subject.
        status: ``"ok"``, ``"warning"`` (works, but not as well as it could) or
            ``"error"`` (runners cannot start here).
        value: The result.
        advice: A way to fix the problem; empty if there is nothing to do.
        facts: The numbers and names in ``value``, for programs; the unit is in the key
            (``free_bytes``), and an unknown number is None.
    """

    name: str
    status: Level
    value: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def examine(
    *,
    environ: Mapping[str, str] = os.environ,
    probe: Callable[[Mapping[str, str]], ProbeResult] = run_probe,
    kernels_probe: Callable[[Mapping[str, str]], ProbeResult] = run_kernels_probe,
    version: Callable[[str], str | None] | None = None,
    progress: Callable[[str], None] = lambda _step: None,
) -> tuple[Finding, ...]:
    """Check everything a runner depends on; never raises.

    Takes some seconds for MLX and, on a Linux CPU, for every BLAS found. The fastest BLAS is
    stored and used by all later starts. Other load on the machine, which lowers the speeds, is
    reported as a finding.

    Args:
        environ: The environment from which a runner would be started.
        probe: Queries MLX in a child process with a given environment.
        kernels_probe: Compiles a kernel in such a process.
        version: Returns the version of a distribution; None if not installed.
        progress: Called with a description of each step before it.
    """
    progress("examining this machine")
    version = version or _version
    backend = installed_backend()
    findings = [
        _python(),
        _platform(),
        _cores(usable_cores()),
        *_packages(version),
        *_devices(),
        *_memory(free_memory()),
    ]
    if all(version(name) for name in ("mlx", "mlx-lm")):
        findings += _mlx(environ, backend, probe, kernels_probe, progress)
    return tuple(findings)


def _python() -> Finding:
    facts = {"version": platform.python_version(), "executable": sys.executable}
    return Finding("Python", "ok", f"{facts['version']} ({sys.executable})", facts=facts)


def _platform() -> Finding:
    try:
        check_platform()
    except RunnerError as error:
        return Finding("platform", "error", platform.platform(), str(error))
    return Finding("platform", "ok", platform.platform())


def _cores(cores: Cores) -> Finding:
    value = str(cores.count)
    if cores.group:
        value += f" of {cores.schedulable}, limited by the CPU quota of {cores.group}"
    return Finding("processor cores", "ok", value, facts=asdict(cores))


def _packages(version: Callable[[str], str | None]) -> list[Finding]:
    findings = [
        Finding(name, "ok", found, facts={"version": found})
        if (found := version(name))
        else _broken_install(name)
        for name in ("grpcio", "protobuf")
    ]
    server = {name: version(name) for name in _SERVER_PACKAGES}
    missing = [name for name, installed in server.items() if not installed]
    if not package_folders("runner_server"):
        missing.append("runner_server")
    if missing:
        text = f"not installed: {', '.join(missing)}"
        return [*findings, Finding("server extra", "error", text, _INSTALL_SERVER)]
    text = ", ".join(f"{name} {installed}" for name, installed in server.items())
    return [*findings, Finding("server extra", "ok", text, facts=server)]


def _broken_install(name: str) -> Finding:
    return Finding(name, "error", "not installed", "reinstall: pip install mlx-grpc-runner")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    return [
        Finding(
            f"device {number}",
            "warning" if device.reason else "ok",
            f"{device.kind}: {device.name}, {_size(device.free_bytes)} of "
            f"{_size(device.total_bytes)} free",
            device.reason,
            asdict(device),
        )
        for number, device in enumerate(device_infos())
    ]


def _memory(free: FreeMemory) -> list[Finding]:
    figures = {
        "system": free.system_bytes,
        "cgroup": free.cgroup_bytes,
        "device": free.device_bytes,
    }
    text = ", ".join(
        f"{name} {_size(figure) if figure is not None else 'no limit'}"
        for name, figure in figures.items()
    )
    value = f"{_size(free.available_bytes)}, limited by {free.source} ({text})"
    facts = {f"{name}_bytes": figure for name, figure in figures.items()}
    facts |= {"available_bytes": free.available_bytes}
    return [Finding("free memory", "ok", value, facts=facts | {"source": free.source})]


def _size(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)


def _mlx(
    environ: Mapping[str, str],
    backend: Backend,
    probe: Callable[[Mapping[str, str]], ProbeResult],
    kernels_probe: Callable[[Mapping[str, str]], ProbeResult],
    progress: Callable[[str], None],
) -> list[Finding]:
    """Return the findings about MLX in the environment of a runner."""
    environment = child_environment(environ, backend=backend, blas="off")
    libraries = installed_blas() if backend == "cpu" else ()
    before = cpu_clock()
    measured = measure(libraries, environment, probe, progress)
    load = OtherLoad.between(before, cpu_clock())
    result = measured[0].result
    if result.failure:
        advice = "MLX cannot run here: see the lines above; reinstall the server extra"
        return [Finding("MLX", "error", result.failure, advice)]
    progress("compiling a kernel")
    kernels = kernels_probe(measured[0].environment)
    facts = result.facts
    device = facts.get("device") or {}
    name = device.get("device_name") or device.get("architecture") or "unknown device"
    value = f"{facts.get('mlx_version')} on {facts.get('backend')} ({name})"
    names = {"version": facts.get("mlx_version"), "backend": facts.get("backend"), "device": name}
    findings = [
        _agreement(value, names, backend),
        _kernels({**facts, **kernels.facts}, kernels.failure),
    ]
    if backend == "cpu":
        is_chosen_by_user = has_blas_in_front(environ)
        finding = _preloaded(measured[0]) if is_chosen_by_user else _blas(measured)
        findings.append(finding)
        if libraries and measured[0].gflops and not is_chosen_by_user:
            findings.append(_remembered(environ, measured[0], libraries))
        findings.append(_other_load(load))
        findings.append(Finding("weights", "ok", _CPU_WEIGHTS))
    return findings


def _other_load(load: OtherLoad) -> Finding:
    value = f"{load.busy_cores:.1f} of {load.cores} cores busy with other processes"
    facts = {"busy_cores": round(load.busy_cores, 3), "cores": load.cores}
    if load.disturbs(usable_cores().count):
        return Finding("other load", "warning", value, _BUSY, facts)
    return Finding("other load", "ok", value, facts=facts)


def _agreement(value: str, facts: Mapping[str, Any], expected: Backend) -> Finding:
    if facts["backend"] == expected:
        return Finding("MLX", "ok", value, facts=facts)
    advice = (
        f"the installed packages are for {expected}: check the driver, and that exactly one of the "
        "extras cpu, cuda12 and cuda13 is installed"
    )
    return Finding("MLX", "warning", value, advice, facts)


def _kernels(facts: Mapping[str, Any], failure: str) -> Finding:
    compiler = facts.get("compiler")
    if facts.get("kernels_compile"):
        how = f" with {compiler}" if facts.get("backend") == "cpu" else ""
        return Finding("kernel compilation", "ok", f"works{how}")
    unknown = failure or "failed for an unknown reason"
    reason = str(facts.get("errors", {}).get("kernels_compile", unknown))
    if facts.get("backend") != "cpu":
        return Finding("kernel compilation", "error", reason, _CUDA_HEADERS)
    # A runner works without g++ or with a broken one, only slower.
    advice = f"{compiler} does not work; {_INSTALL_COMPILER}" if compiler else _INSTALL_COMPILER
    return Finding("kernel compilation", "warning", reason, advice)


_CUDA_HEADERS = (
    "on CUDA, MLX needs the runtime's headers: pip install nvidia-cuda-runtime (CUDA 13) or "
    "nvidia-cuda-runtime-cu12, or set CUDA_HOME"
)


def _blas(measured: Sequence[Measurement]) -> Finding:
    """Return the finding about the fastest BLAS, compared with MLX's own."""
    best = measured[0]
    own = next(one for one in measured if one.blas is None)
    rows = table(measured) if len(measured) > 1 else []
    facts = {"measured": [_speed(one) for one in measured]}
    if not best.gflops:
        value = "\n".join(("speed not measured", *rows))
        return Finding("BLAS", "warning", value, _INSTALL_BLAS, facts)
    # The library that MLX really calls, because preloading one may have no effect.
    name = best.result.facts.get("blas") or best.name
    text = f"{name}: {best.gflops:.1f} GFLOP/s in float32"
    if best.blas and own.gflops:
        text += f", {best.gflops / own.gflops:.0f} times the {own.gflops:.1f} of MLX's own"
    gains = best.blas is not None and best.gflops >= _FAST_RATIO * own.gflops
    is_fast = gains or best.gflops >= _FAST_GFLOPS
    status: Level = "ok" if is_fast else "warning"
    advice = "" if is_fast else _INSTALL_BLAS
    return Finding("BLAS", status, "\n".join((text, *rows)), advice, facts)


def _speed(one: Measurement) -> dict[str, Any]:
    path = str(one.blas.path) if one.blas else None
    return {"name": one.name, "path": path, "gflops": one.gflops or None}


def _preloaded(one: Measurement) -> Finding:
    """Return the finding about a BLAS preloaded by the user; no other library is tried."""
    name = one.result.facts.get("blas") or "unknown"
    value = f"{name}, from LD_PRELOAD: {one.gflops:.1f} GFLOP/s in float32"
    facts = {"measured": [_speed(one) | {"name": name}]}
    if one.gflops >= _FAST_GFLOPS:
        return Finding("BLAS", "ok", value, facts=facts)
    advice = "unset LD_PRELOAD: the fastest installed BLAS is then found and preloaded"
    return Finding("BLAS", "warning", value, advice, facts)


def _remembered(
    environ: Mapping[str, str], best: Measurement, libraries: Sequence[Blas]
) -> Finding:
    """Store the fastest BLAS for later starts."""
    try:
        path = remember(environ, Choice(best.blas), libraries)
    except OSError as error:
        advice = "choose a BLAS by hand (mlx-runner serve --blas PATH), or fix the folder"
        return Finding("BLAS choice", "warning", f"not remembered: {error}", advice)
    return Finding("BLAS choice", "ok", f"{best.name}, remembered in {path}")
