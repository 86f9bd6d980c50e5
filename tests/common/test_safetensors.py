"""Headers of weight files: valid ones yield tensors, others an error naming the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner_common.safetensors import HeaderError, Tensor, read_header
from support.safetensors_files import write_file, write_tensors


def test_header_gives_name_type_shape_and_size(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a": ("BF16", (3, 5)), "b": ("U32", ())})
    assert read_header(path) == (
        Tensor("a", "BF16", (3, 5), 30),
        Tensor("b", "U32", (), 4),
    )


def test_only_the_header_is_read(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a": ("F32", (1 << 18, 1 << 18))})
    assert read_header(path)[0].nbytes == 1 << 38  # a sparse file of 256 GiB


def test_empty_tensors_do_not_overlap(tmp_path: Path) -> None:
    shapes = {"a": ("F32", (2,)), "none": ("F32", (0, 7)), "b": ("F32", (2,))}
    path = write_tensors(tmp_path / "m.safetensors", shapes)
    assert {tensor.name for tensor in read_header(path)} == set(shapes)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data_bytes", "says"),
    [
        ({"t": entry()}, 7, "cut short"),
        ({"t": entry(), "u": entry(offsets=(4, 12))}, 12, "overlaps"),
        ({"t": entry(shape=(3,))}, 8, "is inconsistent"),
        ({"t": entry(shape=(-1, -2))}, 8, "is inconsistent"),
        ({"t": entry(shape=(True, 2))}, 8, "is inconsistent"),
        ({"t": entry(offsets=(8, 0))}, 8, "is inconsistent"),
        ({"t": entry(offsets=(-8, 0))}, 8, "is inconsistent"),
        ({"t": entry(offsets=(0, 8, 16))}, 8, "is inconsistent"),
        ({"t": entry(dtype="Q4")}, 8, "is inconsistent"),
        ({"t": {"dtype": "F32"}}, 8, "is inconsistent"),
        ({"t": 3}, 8, "is inconsistent"),
        (b"[1, 2]", 0, "not a JSON object"),
        (b"{not json", 0, "not JSON"),
        (b"\xff\xfe{}", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
    ],
)
def test_a_false_header_is_refused_by_name(
    tmp_path: Path, header: dict[str, Any] | bytes, data_bytes: int, says: str
) -> None:
    path = write_file(tmp_path / "bad.safetensors", header, data_bytes)
    with pytest.raises(HeaderError, match=says) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01\x02", b"\x00" * 8, (1 << 40).to_bytes(8, "little") + b"{}", b"\xff" * 64],
)
def test_a_false_header_length_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=r"bad\.safetensors.*download it again"):
        read_header(path)
