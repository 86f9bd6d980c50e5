"""Handwritten model directories: headers are true or false, data is sparse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name to (dtype, shape)."""


def header_of(shapes: Shapes) -> dict[str, Any]:
    """Return a true header."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        nbytes = BYTES[dtype]
        for length in shape:
            nbytes *= length
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    return header


def write_file(path: Path, header: dict[str, Any] | bytes, data_bytes: int) -> Path:
    """Write a file with ``header`` and ``data_bytes`` of sparse data."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + data_bytes)
    return path


def write_tensors(path: Path, shapes: Shapes) -> Path:
    """Write a file with a true header."""
    header = header_of(shapes)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return write_file(path, header, max(ends, default=0))


def write_model(path: Path, shapes: Shapes, config: dict[str, Any]) -> Path:
    """Write a model directory with one weight file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    write_tensors(path / "model.safetensors", shapes)
    return path


def attention(prefix: str, layers: int, hidden: int, kv_rows: int, dtype: str = "BF16") -> Shapes:
    """Return the key and value projections of a stack of layers."""
    return {
        f"{prefix}layers.{layer}.self_attn.{kind}_proj.weight": (dtype, (kv_rows, hidden))
        for layer in range(layers)
        for kind in "kv"
    }
