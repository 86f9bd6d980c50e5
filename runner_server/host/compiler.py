"""Check that g++ can compile a library and that the library can be loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

CHECK_LIBRARY = "libmlx_runner_check.so"


class CompilerError(Exception):
    """g++ cannot compile. The message says why."""


_SOURCE = """#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
extern "C" double mlx_runner_check(double x) { return std::exp(x); }
"""
_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared")
"""The compiler options of MLX 0.32 (mlx/backend/cpu/jit_compiler.cpp)."""

_TIMEOUT_SECONDS = 60.0

_MIN_FREE_BYTES = 16 << 20
"""A kernel takes 20 KiB, or a few hundred while it compiles. A model needs dozens of kernels."""


def check_compiler(folder: Path) -> None:
    """Load a test library from a folder, compiling the library first if necessary.

    Args:
        folder: Folder in which MLX will store kernels.

    Raises:
        CompilerError: g++ failed.
        OSError: The folder does not allow loading libraries, or its disk is full.
    """
    status = os.statvfs(folder)
    if status.f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError(f"{folder} is mounted noexec")
    free = status.f_bavail * status.f_frsize
    if free < _MIN_FREE_BYTES:
        raise OSError(f"the disk of {folder} has {free} bytes free; at least {_MIN_FREE_BYTES}")
    library = folder / CHECK_LIBRARY
    if not library.exists():
        _compile(library)
    ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    source = library.with_suffix(".cpp")
    source.write_text(_SOURCE)
    command = ["g++", *_OPTIONS, str(source), "-o", str(library)]
    try:
        subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(library.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        last = error.stdout.decode(errors="replace").strip().rpartition("\n")[2]
        raise CompilerError(f"g++ failed with exit code {error.returncode}: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"g++ cannot be run: {error}") from error
