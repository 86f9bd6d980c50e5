"""Lazy MLX arrays of streams that Python reads.

MLX makes them in one place: the members of an ``.npz`` archive, which it opens with Python's
``zipfile``. Tensors are presented to it as such an archive.

The threads on which MLX reads need Python's lock, so nothing may evaluate these arrays while it
keeps that lock. Of some forty calls that evaluate, two do in 0.32.4, ``bytes(array)`` and
``mx.save``, and no model of mlx_lm uses them. On CUDA MLX reads on the engine's thread and copies
to the device. Neither CUDA nor Metal was measured.
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
    # MLX keeps 8-bit floats as the bytes they are.
    "F8_E4M3": "|u1",
    "F8_E8M0": "|u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    # As MLX itself writes bfloat16, which NumPy does not have.
    "BF16": "<V2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "C64": "<c8",
}
"""Types as headers of ``.npy`` have them, by their names in safetensors: those that MLX has."""


class TensorStream:
    """One tensor as a ``.npy`` stream, as far as MLX asks one.

    Args:
        tensor: What it is.
        fill: Called with the stream and memory for the whole tensor, on a thread of MLX; must
            not raise.

    Raises:
        ValueError: MLX has no such arrays.
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
    """Return arrays that read their streams when they are evaluated, by name.

    Args:
        path: What MLX takes for the name of an archive.
        streams: The tensors.

    Raises:
        Exception: Of any kind: this release of MLX reads archives without Python.
    """
    with _opening_archives():
        loaded = mx.load(_Archive(path, streams), format="npz")
    # What mx.load returns depends on the format.
    found = cast("dict[str, mx.array]", loaded)
    return {stream.tensor.name: found[str(i)] for i, stream in enumerate(streams)}


def _npy_header(tensor: Tensor) -> bytes:
    """Return the header of a ``.npy`` file, version 1 of the format.

    Raises:
        ValueError: MLX has no such arrays.
    """
    if tensor.dtype not in _NUMPY_TYPES:
        raise ValueError(f"{tensor.name} has the type {tensor.dtype}, which MLX does not have")
    if any(length > _MAX_DIMENSION for length in tensor.shape):
        raise ValueError(f"{tensor.name} has the shape {tensor.shape}, too long for MLX")
    shape = "".join(f"{length}, " for length in tensor.shape)
    described = (
        f"{{'descr': '{_NUMPY_TYPES[tensor.dtype]}', 'fortran_order': False, 'shape': ({shape})}}\n"
    ).encode()
    return b"\x93NUMPY\x01\x00" + len(described).to_bytes(2, "little") + described


class _Archive(str):
    """A weight file in the place of an ``.npz`` archive.

    Args:
        path: The file's name, which MLX takes for the archive's.
        streams: Its tensors; their places are their names, because MLX changes some names.
    """

    __slots__ = ("_streams",)
    _streams: Sequence[TensorStream]

    def __new__(cls, path: str, streams: Sequence[TensorStream]) -> Self:
        archive = super().__new__(cls, path)
        archive._streams = streams
        return archive

    def namelist(self) -> list[str]:
        """See ``zipfile.ZipFile``, as do the methods that follow."""
        return [str(i) for i in range(len(self._streams))]

    def open(self, name: str, **_options: object) -> TensorStream:
        return self._streams[int(name)]

    def read(self, name: str) -> bytes:
        raise NotImplementedError(name)

    def close(self) -> None:
        pass


class _ZipFile(zipfile.ZipFile):
    """``zipfile.ZipFile`` that takes an :class:`_Archive` for open, and opens all else."""

    def __new__(cls, file: object, *_args: object, **_options: object) -> Any:
        return file if isinstance(file, _Archive) else super().__new__(cls)


def _is_zipfile(file: Any) -> bool:
    return isinstance(file, _Archive) or zipfile.is_zipfile(file)


@contextmanager
def _opening_archives() -> Iterator[None]:
    """Let what imports ``zipfile`` meanwhile open an :class:`_Archive` too."""
    shell = ModuleType(zipfile.__name__)
    vars(shell).update(vars(zipfile), ZipFile=_ZipFile, is_zipfile=_is_zipfile)
    sys.modules[zipfile.__name__] = shell
    try:
        yield
    finally:
        sys.modules[zipfile.__name__] = zipfile
