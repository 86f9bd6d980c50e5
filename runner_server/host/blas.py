"""Detection of the BLAS library used on the CPU.

MLX calls ``cblas_sgemm`` (mlx/backend/cpu/gemms/cblas.cpp). The dynamic linker reports the library
that provides it. A library in ``LD_PRELOAD`` thus counts only if it was really loaded, and another
package's library does not count, such as the OpenBLAS in NumPy's wheel.
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
    """Return the name of the BLAS library, as reported in ``StatusResponse.blas``.

    Args:
        device: The engine's device; empty before MLX is imported.

    Returns:
        The name; empty unless the device is a CPU and MLX is imported.
    """
    return _blas_in_use() if device.startswith("cpu") and _MLX in sys.modules else ""


@cache
def _blas_in_use() -> str:
    if sys.platform == "darwin":
        return "Accelerate"
    library = _library_of(_FUNCTION)
    return blas_name(library) if library else "unknown BLAS"


def blas_name(library: Path) -> str:
    """Return the common name of a BLAS library."""
    # Debian's OpenBLAS is also a libblas.so.3, in a folder named after OpenBLAS.
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
    """Return the library that provides a function to MLX, looking in the global scope first."""
    for scope in (ctypes.CDLL(None), ctypes.CDLL(sys.modules[_MLX].__file__)):
        if hasattr(scope, function):
            address = ctypes.cast(getattr(scope, function), ctypes.c_void_p)
            found = _SymbolInfo()
            if scope.dladdr(address, ctypes.byref(found)) and found.file:
                return Path(found.file.decode(errors="replace"))
    return None
