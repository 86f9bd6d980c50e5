"""Choice of the weight files in a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner_common.model_directory import ModelUnusableError
from runner_common.model_directory.weight_files import choose_weight_files, read_tensors
from support.safetensors_files import Shapes, write_tensors

ONE: Shapes = {"a": ("F32", (2,))}
TWO: Shapes = {"b": ("F32", (2,))}
SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
INDEX = "model.safetensors.index.json"


def sharded(directory: Path, shards: dict[str, str] = SHARDS, *, index: bool = True) -> Path:
    for name, file in shards.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / file, {name: ("F32", (2,))})
    if index:
        (directory / INDEX).write_text(json.dumps({"weight_map": shards}))
    return directory


def chosen(directory: Path) -> list[str]:
    choice = choose_weight_files(directory)
    read_tensors(choice)
    return [str(file.relative_to(directory)) for file in choice.files]


def test_the_index_determines_the_files(tmp_path: Path) -> None:
    assert chosen(sharded(tmp_path)) == [*SHARDS.values()]
    assert not choose_weight_files(tmp_path).notes


@pytest.mark.parametrize("names", [("x.safetensors", "y.safetensors"), ("p/x.safetensors",) * 2])
def test_an_index_may_use_any_names_and_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    shards = dict(zip("ab", names, strict=True))
    sharded(tmp_path, shards)
    assert chosen(tmp_path) == sorted(set(names))


@pytest.mark.parametrize(
    "extra",
    [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model.fp16.safetensors",
        "consolidated.safetensors",
    ],
)
def test_a_file_outside_the_index_is_ignored(tmp_path: Path, extra: str) -> None:
    write_tensors(sharded(tmp_path) / extra, {**ONE, "stranger": ("F32", (3,))})
    assert chosen(tmp_path) == [*SHARDS.values()]
    assert any(extra in note for note in choose_weight_files(tmp_path).notes)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "{"])
def test_a_broken_index_is_ignored_beside_a_single_file(tmp_path: Path, index: str) -> None:
    write_tensors(tmp_path / "model.safetensors", ONE)
    (tmp_path / INDEX).write_text(index)
    assert chosen(tmp_path) == ["model.safetensors"]
    assert any(INDEX in note for note in choose_weight_files(tmp_path).notes)


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_tensors(tmp_path / "model.safetensors", ONE)
    (tmp_path / INDEX).write_bytes(b"\xef\xbb\xbf" + (tmp_path / INDEX).read_bytes())
    assert chosen(tmp_path) == [*SHARDS.values()]


@pytest.mark.parametrize(
    "name", ["/etc/x.safetensors", "../x.safetensors", "p/../../x", "x.bin", "", 3, ["x"]]
)
def test_an_index_may_name_only_files_in_its_directory(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelUnusableError, match=r"not a \*.safetensors of this"):
        chosen(tmp_path)


def test_a_stale_index_is_ignored_beside_a_single_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    for file in SHARDS.values():
        (tmp_path / file).unlink()
    write_tensors(tmp_path / "model.safetensors", ONE)
    assert chosen(tmp_path) == ["model.safetensors"]
    assert any("missing" in note for note in choose_weight_files(tmp_path).notes)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS["b"]).unlink()
    with pytest.raises(ModelUnusableError, match=r"1 missing file.*model-00002-of-00002"):
        chosen(tmp_path)


def test_shards_without_an_index_form_a_set(tmp_path: Path) -> None:
    sharded(tmp_path, index=False)
    write_tensors(tmp_path / "model-00003-of-00003.safetensors", {"stranger": ("F32", (3,))})
    assert chosen(tmp_path) == [*SHARDS.values()]


def test_an_incomplete_set_without_an_index_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path, index=False) / SHARDS["a"]).unlink()
    with pytest.raises(ModelUnusableError, match=r"model-00001-of-00002\.safetensors is missing"):
        chosen(tmp_path)


def test_two_models_without_an_index_are_refused(tmp_path: Path) -> None:
    write_tensors(sharded(tmp_path, index=False) / "model.safetensors", ONE)
    with pytest.raises(ModelUnusableError, match=r"model-00001-of-00002.*or model\.safetensors"):
        chosen(tmp_path)


def test_another_dtype_beside_the_whole_file_is_ignored(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {**ONE, **TWO})
    write_tensors(tmp_path / "model.fp16.safetensors", {"a": ("F16", (2,))})
    assert chosen(tmp_path) == ["model.safetensors"]


def test_files_with_different_tensors_form_one_model(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", ONE)
    write_tensors(tmp_path / "model-extra.safetensors", TWO)
    assert chosen(tmp_path) == ["model-extra.safetensors", "model.safetensors"]


def test_one_file_may_have_any_name(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", ONE)
    write_tensors(tmp_path / "adapters.safetensors", TWO)
    assert chosen(tmp_path) == ["weights.safetensors"]


def test_a_tensor_in_two_files_is_refused_if_its_bytes_differ(tmp_path: Path) -> None:
    shards = {"a": "x.safetensors", "b": "y.safetensors"}
    sharded(tmp_path, shards)
    write_tensors(tmp_path / "y.safetensors", {**TWO, **ONE})
    assert chosen(tmp_path) == [*shards.values()]
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(ModelUnusableError, match=r"a is in .*x\.safetensors and in .*y\.saf"):
        chosen(tmp_path)


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelUnusableError, match=r"model\.safetensors is a Git LFS pointer"):
        chosen(tmp_path)


def test_the_error_for_other_formats_names_the_converter(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelUnusableError, match=r"pytorch_model\.bin.*mlx_lm\.convert"):
        chosen(tmp_path)


def test_an_empty_directory_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusableError, match=r"no \*\.safetensors in"):
        chosen(tmp_path)
