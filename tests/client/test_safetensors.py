"""Model files: true headers give the tensors, the others an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner_client._safetensors import (
    Tensor,
    read_config,
    read_header,
    read_tensors,
    resolve_model,
)
from runner_client.errors import ModelNotFoundError, ModelUnsupportedError
from safetensors_files import write_file, write_model, write_tensors


def test_header_gives_name_type_shape_and_size(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a": ("BF16", (3, 5)), "b": ("U32", ())})
    assert read_header(path) == (
        Tensor("a", "BF16", (3, 5), 30),
        Tensor("b", "U32", (), 4),
    )


def test_nothing_but_the_header_is_read(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a": ("F32", (1 << 18, 1 << 18))})
    assert read_header(path)[0].nbytes == 1 << 38  # a sparse file of 256 GiB


def test_empty_tensors_overlap_nothing(tmp_path: Path) -> None:
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
        ({"t": entry(shape=(3,))}, 8, "not true"),
        ({"t": entry(shape=(-1, -2))}, 8, "not true"),
        ({"t": entry(shape=(True, 2))}, 8, "not true"),
        ({"t": entry(offsets=(8, 0))}, 8, "not true"),
        ({"t": entry(offsets=(-8, 0))}, 8, "not true"),
        ({"t": entry(offsets=(0, 8, 16))}, 8, "not true"),
        ({"t": entry(dtype="Q4")}, 8, "not true"),
        ({"t": {"dtype": "F32"}}, 8, "not true"),
        ({"t": 3}, 8, "not true"),
        (b"[1, 2]", 0, "no JSON object"),
        (b"{not json", 0, "no JSON"),
        (b"\xff\xfe{}", 0, "no JSON"),
        (b"[" * 100_000, 0, "no JSON"),
    ],
)
def test_header_that_lies_is_refused_by_name(
    tmp_path: Path, header: dict[str, Any] | bytes, data_bytes: int, says: str
) -> None:
    path = write_file(tmp_path / "bad.safetensors", header, data_bytes)
    with pytest.raises(ModelUnsupportedError, match=says) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01\x02", b"\x00" * 8, (1 << 40).to_bytes(8, "little") + b"{}", b"\xff" * 64],
)
def test_header_length_that_lies_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelUnsupportedError, match=r"bad\.safetensors.*download it again"):
        read_header(path)


def sharded(directory: Path, shards: dict[str, str]) -> Path:
    directory.mkdir()
    for name, file in shards.items():
        write_tensors(directory / file, {name: ("F32", (2,))})
    index = {"weight_map": shards}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


SHARDS = {
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00002-of-00002.safetensors",
}


def test_shards_are_read_together(tmp_path: Path) -> None:
    assert set(read_tensors(sharded(tmp_path / "m", SHARDS))) == {"a", "b"}


def test_missing_shard_is_named(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "m", SHARDS)
    (directory / SHARDS["b"]).unlink()
    with pytest.raises(ModelUnsupportedError, match=r"1 file.*model-00002-of-00002"):
        read_tensors(directory)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', "{"])
def test_odd_index_is_refused_by_name(tmp_path: Path, index: str) -> None:
    write_model(tmp_path, {"a": ("F32", (2,))}, {})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelUnsupportedError, match=r"model\.safetensors\.index\.json"):
        read_tensors(tmp_path)


def test_other_formats_are_pointed_at_the_converter(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelUnsupportedError, match=r"pytorch_model\.bin.*mlx_lm\.convert"):
        read_tensors(tmp_path)


def test_empty_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupportedError, match=r"no model\*\.safetensors in"):
        read_tensors(tmp_path)
    with pytest.raises(ModelUnsupportedError, match=r"no config\.json in"):
        read_config(tmp_path)


def test_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()


def cached(hub: Path, commit: str = "abc123") -> Path:
    folder = hub / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ],
)
def test_hub_id_is_found_in_the_cache(tmp_path: Path, variable: str, below: str) -> None:
    snapshot = cached(tmp_path / below)
    assert resolve_model("org/name", {variable: str(tmp_path)}) == snapshot


def test_cache_below_the_home_directory_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    snapshot = cached(tmp_path / ".cache" / "huggingface" / "hub")
    assert resolve_model("org/name", {}) == snapshot


def test_unknown_hub_id_says_where_it_looked_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="hf download org/name") as caught:
        resolve_model("org/name", {"HF_HUB_CACHE": str(tmp_path)})
    assert str(tmp_path) in str(caught.value)
    assert caught.value.model == "org/name"


def test_revision_without_files_is_named(tmp_path: Path) -> None:
    cached(tmp_path).rmdir()
    with pytest.raises(ModelNotFoundError, match="abc123"):
        resolve_model("org/name", {"HF_HUB_CACHE": str(tmp_path)})


def test_file_is_not_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model(str(path))


@pytest.mark.parametrize("model", ["", "/no/such/place", "../no/such", "a/b/c", "x" * 5000, "a\0b"])
def test_anything_else_is_not_found(tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve_model(model, {"HF_HUB_CACHE": str(tmp_path)})
