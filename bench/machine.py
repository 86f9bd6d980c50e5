"""Description of the machine and package versions for the report."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from bench.contenders._environment import environment
from bench.paths import CACHE, ROOT, SMG_PYTHON

_OUR_PACKAGES = ("mlx-grpc-runner", "mlx", "mlx-lm", "grpcio", "protobuf", "transformers")
_SMG_PACKAGES = ("smg-grpc-servicer", "smg-grpc-proto", "mlx", "mlx-lm", "grpcio")


def describe() -> dict[str, Any]:
    """Describe machine, versions, time, and the BLAS with its GEMM speed."""
    stock = _probe("off")
    fast = _probe("auto")
    return {
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": _os_name(),
        "python": platform.python_version(),
        "device": fast.get("device"),
        "blas": fast.get("blas"),
        "gemm_gflops": fast.get("gemm_gflops"),
        "gemm_gflops_stock": stock.get("gemm_gflops"),
        "packages": {name: _version(name) for name in _OUR_PACKAGES},
        "smg_packages": _smg_versions(),
    }


def _probe(blas: str) -> dict[str, Any]:
    """Probe MLX in the environment that contenders run in."""
    command = [sys.executable, "-m", "runner_server.mlx_backend.probe", "--gemm"]
    done = subprocess.run(
        command, env=environment(blas), cwd=CACHE, capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return answer


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = any("avx512f" in line for line in lines if line.startswith("flags"))
    return f"{names[0] if names else platform.machine()}{' with AVX-512' if wide else ''}"


def _os_name() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()
    return f"{name}, {platform.system()} {platform.machine()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _smg_versions() -> dict[str, str]:
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    command = [str(SMG_PYTHON), "-c", code, *_SMG_PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(_SMG_PACKAGES, "not installed")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def _commit() -> str:
    """Return the measured commit, with a plus sign if the working tree was dirty."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    environment_of_git = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment_of_git, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
