"""Devices for running models, and the memory of each, without importing MLX."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Backend = Literal["metal", "cuda", "cpu"]

COMMAND_TIMEOUT_SECONDS = 5.0
"""Longest wait for a command: a wedged driver can hang ``nvidia-smi`` indefinitely."""

_CUDA_DISTRIBUTIONS = ("mlx-cuda-13", "mlx-cuda-12", "mlx-cuda")
_MIB = 1024**2
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Name, kind and memory of a device.

    Attributes:
        name: The manufacturer's name of the device.
        kind: ``"metal"``, ``"cuda"`` or ``"cpu"``.
        total_bytes: Total memory of the device; for Metal and the CPU, of the machine. None if
            unknown.
        free_bytes: Free memory; for Metal, the working-set limit. None if unknown.
        reason: Why a figure is unknown; empty if all are known.
        device_id: Unique id of the device; empty for Metal and the CPU, which use the
            system's memory.
    """

    name: str
    kind: Backend
    total_bytes: int | None
    free_bytes: int | None
    reason: str = ""
    device_id: str = ""


def run_command(command: Sequence[str]) -> str:
    """Run a command; return the standard output.

    Raises:
        OSError: The command does not exist or may not be run.
        subprocess.SubprocessError: The command failed or took longer than
            ``COMMAND_TIMEOUT_SECONDS``.
    """
    return subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=COMMAND_TIMEOUT_SECONDS,
    ).stdout


def is_installed(distribution: str) -> bool:
    """Return whether a distribution is installed in this environment."""
    from importlib import metadata  # noqa: PLC0415 - slow, and servers do not need it

    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _system_memory() -> tuple[int, int]:
    try:
        memory = psutil.virtual_memory()
    except (psutil.Error, OSError):  # Linux without /proc
        page = os.sysconf("SC_PAGE_SIZE")
        # Excludes the page cache, whose size is unknown without /proc.
        return os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return memory.total, memory.available


@dataclass(frozen=True, slots=True)
class Host:
    """Sources of facts about this machine, replaceable in tests.

    Attributes:
        root: The directory that contains ``proc`` and ``sys``.
        system: ``sys.platform`` of the machine.
        machine: ``platform.machine()`` of the machine.
        environ: Environment variables.
        run: Runs a command and returns its output; raises ``OSError`` or
            ``subprocess.SubprocessError``.
        installed: Returns whether a distribution is installed.
        memory: Returns total and available bytes of the system.
    """

    root: Path = Path("/")
    system: str = sys.platform
    machine: str = field(default_factory=platform.machine)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    run: Callable[[Sequence[str]], str] = run_command
    installed: Callable[[str], bool] = is_installed
    memory: Callable[[], tuple[int, int]] = _system_memory


def installed_backend(host: Host | None = None) -> Backend:
    """Return the backend of the installed MLX distribution."""
    host = host or Host()
    if host.system == "darwin":
        return "metal" if host.machine == "arm64" else "cpu"
    if any(host.installed(name) for name in _CUDA_DISTRIBUTIONS):
        return "cuda"
    return "cpu"


def device_infos(host: Host | None = None) -> tuple[DeviceInfo, ...]:
    """Return the devices of the installed backend, of which a runner uses the first.

    Never raises: an unknown figure is None, and ``reason`` says why. Not tested on Metal or CUDA.
    """
    host = host or Host()
    backend = installed_backend(host)
    if backend == "metal":
        return (_metal_device(host),)
    if backend == "cuda":
        return _cuda_devices(host)
    total, available = host.memory()
    return (DeviceInfo(_cpu_name(host), "cpu", total, available),)


def _cpu_name(host: Host) -> str:
    try:
        lines = (host.root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or host.machine or "cpu"


def _metal_device(host: Host) -> DeviceInfo:
    total, _ = host.memory()
    name, _ = _ask(host, ("sysctl", "-n", "machdep.cpu.brand_string"))
    limit, reason = _ask(host, ("sysctl", "-n", "iogpu.wired_limit_mb"))
    set_by_hand = int(limit) * _MIB if limit.isdecimal() else 0
    free = min(set_by_hand, total) or default_working_set_bytes(total)
    return DeviceInfo(name or "Apple GPU", "metal", total, free, reason)


def default_working_set_bytes(total_bytes: int) -> int:
    """Return the GPU working-set limit of macOS when ``iogpu.wired_limit_mb`` is 0.

    Apple publishes no rule. Users report a ``recommendedMaxWorkingSetSize`` of two thirds up to
    32 GiB: 5,461 MiB of 8 GiB, 10,923 MiB of 16 GiB and 21,845 MiB of 32 GiB
    (ggml-org/llama.cpp#5207, abetlen/llama-cpp-python#687, ggml-org/llama.cpp#2011); and of three
    quarters or more from 36 GiB on: 107.5 of 128 GiB (antirez/ds4#893). The lower figure of each
    range is used.
    """
    return total_bytes * 2 // 3 if total_bytes < 36 * _GIB else total_bytes * 3 // 4


def _cuda_devices(host: Host) -> tuple[DeviceInfo, ...]:
    query = "--query-gpu=index,uuid,memory.free,memory.total,name"
    output, reason = _ask(host, ("nvidia-smi", query, "--format=csv,noheader,nounits"))
    rows = [
        tuple(part.strip() for part in line.split(",", 4))
        for line in output.splitlines()
        if line.count(",") >= 4
    ]
    rows = _visible(rows, host.environ.get("CUDA_VISIBLE_DEVICES"))
    if rows:
        return tuple(_cuda_device(*row) for row in rows)
    reason = reason or "nvidia-smi lists no device that CUDA_VISIBLE_DEVICES makes visible"
    return (DeviceInfo("unknown", "cuda", None, None, reason),)


def _cuda_device(index: str, uuid: str, free: str, total: str, name: str) -> DeviceInfo:
    known = free.isdecimal() and total.isdecimal()
    reason = "" if known else f"nvidia-smi reports {free!r} free of {total!r} on device {index}"
    total_bytes = int(total) * _MIB if total.isdecimal() else None
    free_bytes = int(free) * _MIB if free.isdecimal() else None
    return DeviceInfo(name, "cuda", total_bytes, free_bytes, reason, uuid)


def _visible(rows: list[tuple[str, ...]], visible: str | None) -> list[tuple[str, ...]]:
    """Return the visible rows in CUDA's order; like CUDA, stop at the first unknown name."""
    if visible is None:
        return rows
    chosen: list[tuple[str, ...]] = []
    for wanted in (part.strip() for part in visible.split(",")):
        match = [r for r in rows if wanted and (r[0] == wanted or r[1].startswith(wanted))]
        if not match:
            break
        chosen.append(match[0])
    return chosen


def _ask(host: Host, command: Sequence[str]) -> tuple[str, str]:
    """Return a command's output; or, on failure, an empty output and the reason."""
    try:
        return host.run(command).strip(), ""
    except FileNotFoundError:
        return "", f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not answer within {COMMAND_TIMEOUT_SECONDS:.0f} s"
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"{' '.join(command)} failed: {error}"
