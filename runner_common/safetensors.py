"""Parsing and validation of safetensors headers, without loading tensors.

A file has eight bytes with the length of the header, little-endian, then the header as JSON, then
the bytes of the tensors; see https://github.com/huggingface/safetensors#format. Reading a header
takes milliseconds for a file of any size, and needs neither MLX nor huggingface_hub.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class HeaderError(Exception):
    """The header of a file is missing or inconsistent. The message names the file."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Description of a tensor in a file's header.

    Attributes:
        name: Name in the checkpoint.
        dtype: Name of the format: ``"BF16"``, ``"U32"``, ...
        shape: Shape as stored; quantized weights are packed into fewer columns.
        nbytes: Size in the file, in bytes.
        position: Offset of the first byte from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    position: int = field(default=0, compare=False)

    @property
    def size(self) -> int:
        """Number of elements as stored."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[Tensor, ...]:
    """Return the tensors described in a file's header, ordered by position.

    Raises:
        HeaderError: The file cannot be read or is truncated, or its header is inconsistent.
    """
    try:
        with path.open("rb") as file:
            return parse_header(file, path)
    except OSError as error:
        raise HeaderError(f"{path} cannot be read: {error}") from error


def parse_header(file: BinaryIO, path: Path) -> tuple[Tensor, ...]:
    """Return the tensors described in the header of an open file; see :func:`read_header`.

    Args:
        file: The file; its position changes.
        path: Name of the file for messages.

    Raises:
        HeaderError: The file is truncated, or its header is inconsistent.
        OSError: The file cannot be read.
    """
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        raise HeaderError(
            f"{path}: a header of {header_bytes} bytes in a file of {file_bytes}: "
            "not a safetensors file, or cut short; download it again"
        )
    try:
        header = json.loads(file.read(header_bytes))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    return _checked(path, header, _LENGTH_BYTES + header_bytes, file_bytes)


def _checked(
    path: Path, header: dict[str, Any], data_position: int, file_bytes: int
) -> tuple[Tensor, ...]:
    """Return the tensors ordered by position, after checks for overlaps and truncation."""
    described = sorted(
        (_described(path, name, entry, data_position) for name, entry in header.items()),
        key=_by_position,
    )
    end = data_position
    for tensor in described:
        if tensor.position < end:
            raise HeaderError(f"{path}: {tensor.name} overlaps the tensor before it")
        end = tensor.position + tensor.nbytes
        if end > file_bytes:
            raise HeaderError(
                f"{path}: {tensor.name} ends at byte {end} of {file_bytes}: the file is cut "
                "short; download it again"
            )
    return tuple(described)


def _by_position(tensor: Tensor) -> tuple[int, int]:
    # An empty tensor starts at the same position as its neighbour and overlaps nothing.
    return tensor.position, tensor.nbytes


def _described(path: Path, name: str, entry: object, data_position: int) -> Tensor:
    """Convert a header entry to a tensor."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            well_formed = dtype in _BITS and all(type(n) is int and n >= 0 for n in shape)
            if well_formed and math.prod(shape) * _BITS[dtype] == (end - start) * 8 and start >= 0:
                return Tensor(name, dtype, tuple(shape), end - start, data_position + start)
    raise HeaderError(
        f"{path}: the header's entry for {name} is inconsistent (dtype, shape and offsets do not "
        f"agree): {str(entry)[:200]}"
    )
