"""Lazy MLX arrays backed by Python streams.

MLX creates such arrays only for the members of an ``.npz`` archive, which it opens with Python's
``zipfile``. This module presents tensors as such an archive.

MLX's reader threads need the GIL, so a call that evaluates these arrays must release it. Of about
forty calls that evaluate, only ``bytes(array)`` and ``mx.save`` do not in 0.32.4, and no model of
mlx_lm uses these. On CUDA, MLX reads on the engine's thread and copies to the device.
Neither CUDA nor Metal was measured.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Self, cast

import mlx.core as mx

from runner_common.safetensors import Tensor

_MAX_DIMENSION = 2**31 - 1

_NUMPY_TYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    # MLX has no 8-bit floats and keeps their bytes.
    "F8_E4M3": "|u1",
    "F8_E8M0": "|u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    # As MLX itself writes bfloat16, which NumPy lacks.
    "BF16": "<V2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "C64": "<c8",
}
"""Safetensors dtypes mapped to the dtypes of ``.npy`` headers, for the dtypes that MLX supports."""


class TensorStream:
    """One tensor as a ``.npy`` stream, with the methods called by MLX.

    Args:
        tensor: The tensor's name, dtype, shape and position in the file.
        fill: Called with the stream and a buffer for the whole tensor, on one of MLX's threads;
            must not raise.

    Raises:
        ValueError: MLX does not support the dtype or shape.
    """

    closed = False

    def __init__(self, tensor: Tensor, fill: Callable[[TensorStream, memoryview], None]) -> None:
        self.tensor = tensor
        self._fill = fill
        self._header = _npy_header(tensor)
        self._position = 0

    def seek(self, position: int, _whence: int = os.SEEK_SET) -> int:
        """See ``io.IOBase.seek``."""
        self._position = position
        return position

    def tell(self) -> int:
        """See ``io.IOBase.tell``."""
        return self._position

    def readinto(self, memory: memoryview) -> int:
        """See ``io.RawIOBase.readinto``. MLX reads the header in parts, the tensor as a whole."""
        start, size = self._position, len(memory)
        if start < len(self._header):
            memory[:] = self._header[start : start + size]
        else:
            self._fill(self, memory)
        self._position += size
        return size


def lazy_arrays(path: str, streams: Sequence[TensorStream]) -> dict[str, mx.array]:
    """Return arrays by tensor name. Evaluating an array reads its stream.

    Args:
        path: The name of the archive, for MLX.
        streams: The tensors.

    Raises:
        Exception: Of any kind, if this release of MLX reads archives without Python.
    """
    with _opening_archives():
        loaded = mx.load(_Archive(path, streams), format="npz")
    # The type of mx.load's result depends on the format.
    found = cast("dict[str, mx.array]", loaded)
    return {stream.tensor.name: found[str(i)] for i, stream in enumerate(streams)}


def _npy_header(tensor: Tensor) -> bytes:
    """Return the header of a ``.npy`` file, version 1 of the format.

    Raises:
        ValueError: MLX does not support the dtype or shape.
    """
    if tensor.dtype not in _NUMPY_TYPES:
        raise ValueError(f"{tensor.name} has the type {tensor.dtype}, which MLX does not support")
    if any(length > _MAX_DIMENSION for length in tensor.shape):
        raise ValueError(f"{tensor.name} has the shape {tensor.shape}, too long for MLX")
    shape = "".join(f"{length}, " for length in tensor.shape)
    described = (
        f"{{'descr': '{_NUMPY_TYPES[tensor.dtype]}', 'fortran_order': False, 'shape': ({shape})}}\n"
    ).encode()
    return b"\x93NUMPY\x01\x00" + len(described).to_bytes(2, "little") + described


class _Archive(str):
    """Path of a weight file that acts as an open ``.npz`` archive.

    Args:
        path: The file's path.
        streams: The file's tensors. Members are named by their index, because MLX changes some
            names.
    """

    __slots__ = ("_streams",)
    _streams: Sequence[TensorStream]

    def __new__(cls, path: str, streams: Sequence[TensorStream]) -> Self:
        archive = super().__new__(cls, path)
        archive._streams = streams
        return archive

    def namelist(self) -> list[str]:
        """See ``zipfile.ZipFile``, also for the methods below."""
        return [str(i) for i in range(len(self._streams))]

    def open(self, name: str, **_options: object) -> TensorStream:
        return self._streams[int(name)]

    def read(self, name: str) -> bytes:
        raise NotImplementedError(name)

    def close(self) -> None:
        pass


class _ZipFile(zipfile.ZipFile):
    """``zipfile.ZipFile`` that returns an :class:`_Archive` as it is, and opens other files."""

    def __new__(cls, file: object, *_args: object, **_options: object) -> Any:
        return file if isinstance(file, _Archive) else super().__new__(cls)


def _is_zipfile(file: Any) -> bool:
    return isinstance(file, _Archive) or zipfile.is_zipfile(file)


@contextmanager
def _opening_archives() -> Iterator[None]:
    """Let code that imports ``zipfile`` within the context open an :class:`_Archive`."""
    shell = ModuleType(zipfile.__name__)
    vars(shell).update(vars(zipfile), ZipFile=_ZipFile, is_zipfile=_is_zipfile)
    sys.modules[zipfile.__name__] = shell
    try:
        yield
    finally:
        sys.modules[zipfile.__name__] = zipfile
