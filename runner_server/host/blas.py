"""Which library multiplies matrices on the CPU of this process.

MLX calls ``cblas_sgemm`` (mlx/backend/cpu/gemms/cblas.cpp). The dynamic linker is
asked which library answers: that counts a library put in front by ``LD_PRELOAD``
only if it was really loaded, and leaves out those that came with another package
(NumPy's wheel brings an OpenBLAS of its own, which MLX does not see).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

_MLX = "mlx.core"
_FUNCTION = "cblas_sgemm"
_FAMILIES = {
    "openblas": "OpenBLAS",
    "mkl": "MKL",
    "blis": "BLIS",
    "nvpl": "NVPL",
    "armpl": "Arm Performance Libraries",
}
REFERENCE = "reference BLAS of MLX"


def blas_of(device: str) -> str:
    """The name of the library, as ``StatusResponse.blas`` has it.

    Args:
        device: The engine's device; "" before MLX is imported, which gives "", as
            does every device that is no CPU.
    """
    return _blas_in_use() if device.startswith("cpu") and _MLX in sys.modules else ""


@cache
def _blas_in_use() -> str:
    if sys.platform == "darwin":
        return "Accelerate"
    library = _library_of(_FUNCTION)
    return blas_name(library) if library else "unknown BLAS"


def blas_name(library: Path) -> str:
    """What people call a BLAS library, by its file."""
    # Debian's OpenBLAS is a libblas.so.3 too, in a folder of its name.
    real = library.resolve()
    words = f"{library.name} {real.name} {real.parent.name}".lower()
    family = next((name for word, name in _FAMILIES.items() if word in words), None)
    if family:
        return f"{family} ({library.name})"
    return REFERENCE if _comes_with_mlx(library) else f"BLAS ({library.name})"


def _comes_with_mlx(library: Path) -> bool:
    return any(part == "mlx" or part.startswith("mlx_") for part in library.parent.parts)


class _SymbolInfo(ctypes.Structure):
    """``Dl_info`` of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _library_of(function: str) -> Path | None:
    """The library whose function MLX calls: the linker looks everywhere, then beside MLX."""
    for scope in (ctypes.CDLL(None), ctypes.CDLL(sys.modules[_MLX].__file__)):
        if hasattr(scope, function):
            address = ctypes.cast(getattr(scope, function), ctypes.c_void_p)
            found = _SymbolInfo()
            if scope.dladdr(address, ctypes.byref(found)) and found.file:
                return Path(found.file.decode(errors="replace"))
    return None
