"""CPU time of a process by kind of work, sampled with Linux's ``perf``."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bench.records import ContenderError

PRODUCTS = "matrix products"
PACKING = "copies of weights for them"
WAITING = "waiting of BLAS threads"
MLX = "other operations of MLX"
ENGINE = "Python of the engine"
CALLS = "gRPC and the event loop"
MEMORY = "allocations and copies of the C library"
SYSTEM = "operating system"
KINDS = (PRODUCTS, PACKING, WAITING, MLX, ENGINE, CALLS, MEMORY, SYSTEM)

_HERTZ = 997
"""Samples per second of each thread, not a divisor of any timer's rate."""

_SAMPLE = re.compile(r"^\s*(\d+)\s+[0-9a-f]+\s+(.+?)\s+\((.*)\)$")

# OpenBLAS copies ("packs") both matrices of a product into the order in which its kernels read.
_BY_SYMBOL = (
    (re.compile(r"gemm\w*copy|gemm_beta", re.IGNORECASE), PACKING),
    (re.compile(r"gemm|gemv|_dot|_axpy", re.IGNORECASE), PRODUCTS),
    (re.compile(r"sched_yield|blas_thread|exec_blas|do_sched|__schedule"), WAITING),
)
_BY_FILE = (
    (re.compile(r"openblas"), WAITING),
    (re.compile(r"libmlx|mlx/core|/kernels|_contiguous\.so|libm\.|libstdc"), MLX),
    (re.compile(r"cygrpc|libssl|_upb"), CALLS),
    (re.compile(r"libc\.|/ld-"), MEMORY),
)
_PYTHON = re.compile(r"python|\.cpython-|_ctypes")


async def profile(pid: int, seconds: float) -> dict[str, float]:
    """Return the CPUs that a process keeps busy with each kind of work.

    Args:
        pid: Process whose threads are sampled.
        seconds: How long they are sampled.

    Raises:
        ContenderError: ``perf`` is not installed or may not sample the process.
    """
    perf = shutil.which("perf")
    if perf is None:
        raise ContenderError("perf is not installed (a package such as linux-perf)")
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        record = [perf, "record", "--quiet", "-F", str(_HERTZ), "-e", "cpu-clock"]
        await _output([*record, "-p", str(pid), "-o", data, "--", "sleep", str(seconds)])
        samples = await _output([perf, "script", "-i", data, "-F", "tid,ip,sym,dso"])
    counts = kinds_of(samples.splitlines(), pid)
    return {kind: counts[kind] / _HERTZ / seconds for kind in KINDS}


def kinds_of(lines: Iterable[str], main_thread: int) -> Counter[str]:
    """Count samples by kind of work.

    Args:
        lines: Output of ``perf script -F tid,ip,sym,dso``.
        main_thread: Id of the thread with the event loop; other threads with Python are the
            engine's.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        if found := _SAMPLE.match(line):
            thread, symbol, file = found.groups()
            counts[_kind(int(thread) == main_thread, symbol, file)] += 1
    return counts


def _kind(is_main: bool, symbol: str, file: str) -> str:
    if _PYTHON.search(file) and not any(pattern.search(file) for pattern, _ in _BY_FILE):
        return CALLS if is_main else ENGINE
    for text, patterns in ((symbol, _BY_SYMBOL), (file, _BY_FILE)):
        for pattern, kind in patterns:
            if pattern.search(text):
                return kind
    return SYSTEM


async def _output(command: list[str]) -> str:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    out, errors = await process.communicate()
    if process.returncode:
        raise ContenderError(f"perf: {errors.decode(errors='replace').strip()[-300:]}")
    return out.decode(errors="replace")
