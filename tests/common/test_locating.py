"""Locating a model's directory by name, by the rules of the hub cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from runner_common.model_directory import ModelMissingError, locate
from support.safetensors_files import write_model

COMMIT, OTHER = "a" * 40, "b" * 40


def snapshot(hub: Path, commit: str = COMMIT, *, ref: str | None = "main", name: str = "n") -> Path:
    """Write a complete snapshot, and a ref to the commit if ``ref`` is given."""
    folder = hub / f"models--org--{name}"
    path = write_model(folder / "snapshots" / commit, {"a": ("F32", (2,))}, {"model_type": "x"})
    (path / "tokenizer.json").write_text("{}")
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return path.resolve()


@pytest.mark.parametrize(
    "name", ["plain", "with space", "trap[12]", "名前", "~tilde", "a@b", "$HOME"]
)
def test_a_directory_path_is_used_as_given(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for model in (str(tmp_path / name), name):
        located = locate(model)
        assert (located.path, located.is_hub_id) == ((tmp_path / name).resolve(), False)


def test_the_home_directory_comes_from_the_given_environment(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert locate("~/model", {"HOME": str(tmp_path)}).path == (tmp_path / "model").resolve()


@pytest.mark.parametrize(
    ("variable", "value", "below"),
    [
        ("HF_HUB_CACHE", "{}", ""),
        ("HF_HUB_CACHE", "$PLACE", ""),
        ("HF_HUB_CACHE", "${PLACE}/x", "x"),
        ("HF_HUB_CACHE", "~/x", "x"),
        ("HUGGINGFACE_HUB_CACHE", "{}", ""),
        ("HF_HOME", "{}", "hub"),
        ("HF_HOME", "$PLACE/home", "home/hub"),
        ("XDG_CACHE_HOME", "{}", "huggingface/hub"),
        ("XDG_CACHE_HOME", "$PLACE", "huggingface/hub"),
        ("UNUSED", "", ".cache/huggingface/hub"),
    ],
)
def test_a_hub_id_is_found_in_the_cache(
    tmp_path: Path, variable: str, value: str, below: str
) -> None:
    path = snapshot(tmp_path / below)
    environ = {
        "HOME": str(tmp_path),
        "PLACE": str(tmp_path),
        variable: value.replace("{}", str(tmp_path)),
    }
    located = locate("org/n", environ)
    assert (located.path, located.is_hub_id, located.note) == (path, True, "")


def test_huggingface_hub_finds_the_same_directory(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    path = snapshot(tmp_path)
    found = hub.snapshot_download("org/n", cache_dir=tmp_path, local_files_only=True)
    assert Path(found).resolve() == locate("org/n", {"HF_HUB_CACHE": str(tmp_path)}).path == path


@pytest.mark.parametrize("ref", ["v1.0", "pr/3", "feature/long.name"])
def test_a_revision_is_a_ref_or_a_commit(tmp_path: Path, ref: str) -> None:
    newer, older = snapshot(tmp_path), snapshot(tmp_path, OTHER, ref=ref)
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert locate("org/n", environ).path == newer
    for revision in (ref, OTHER):
        assert locate(f"org/n@{revision}", environ).path == older


def test_a_ref_may_end_in_whitespace(tmp_path: Path) -> None:
    path = snapshot(tmp_path)
    (tmp_path / "models--org--n" / "refs" / "main").write_text(f"{COMMIT} \r\n")
    assert locate("org/n", {"HF_HUB_CACHE": str(tmp_path)}).path == path


def test_a_filtered_download_counts_as_complete(tmp_path: Path) -> None:
    path = snapshot(tmp_path)
    listed = tmp_path / "models--org--n" / "trees" / f"{COMMIT}.json"
    listed.parent.mkdir()
    listed.write_text(json.dumps({"files": {"README.md": {"size": 1}}}))
    assert locate("org/n", {"HF_HUB_CACHE": str(tmp_path)}).path == path


def test_another_complete_snapshot_replaces_an_incomplete_one(tmp_path: Path) -> None:
    other = snapshot(tmp_path, OTHER, ref=None)
    partial = snapshot(tmp_path)
    (partial / "model.safetensors").unlink()
    located = locate("org/n", {"HF_HUB_CACHE": str(tmp_path)})
    assert located.path == other
    assert COMMIT in located.note
    assert OTHER in located.note


@pytest.mark.parametrize("lost", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_snapshot_without_a_required_file_is_incomplete(tmp_path: Path, lost: str) -> None:
    path, other = snapshot(tmp_path), snapshot(tmp_path, OTHER, ref=None)
    (path / lost).unlink()
    assert locate("org/n", {"HF_HUB_CACHE": str(tmp_path)}).path == other
    (path / lost).symlink_to("../../blobs/gone")
    assert locate("org/n", {"HF_HUB_CACHE": str(tmp_path)}).path == other


@pytest.mark.parametrize("ref", ["../../../elsewhere", "{}/elsewhere"])
def test_a_ref_cannot_leave_the_snapshots(tmp_path: Path, ref: str) -> None:
    path = snapshot(tmp_path / "hub")
    snapshot(tmp_path / "other").rename(tmp_path / "elsewhere")
    (path.parents[1] / "refs" / "main").write_text(ref.format(tmp_path))
    assert locate("org/n", {"HF_HUB_CACHE": str(tmp_path / "hub")}).path == path


def test_without_refs_main_the_newest_complete_snapshot_is_used(tmp_path: Path) -> None:
    older, newer = snapshot(tmp_path, ref=None), snapshot(tmp_path, OTHER, ref="v1")
    os.utime(older, (1, 1))
    located = locate("org/n", {"HF_HUB_CACHE": str(tmp_path)})
    assert located.path == newer
    assert "no refs/main" in located.note


def test_a_requested_revision_is_never_replaced(tmp_path: Path) -> None:
    snapshot(tmp_path)
    with pytest.raises(ModelMissingError, match=f"revision v2.*{COMMIT}"):
        locate("org/n@v2", {"HF_HUB_CACHE": str(tmp_path)})


@pytest.mark.parametrize("revision", ["../../other", "..", "/etc"])
def test_a_revision_cannot_leave_the_snapshots(tmp_path: Path, revision: str) -> None:
    snapshot(tmp_path)
    (tmp_path / "models--org--n" / "other").mkdir()
    with pytest.raises(ModelMissingError):
        locate(f"org/n@{revision}", {"HF_HUB_CACHE": str(tmp_path)})


def test_the_error_for_an_unknown_hub_id_names_the_cache_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError, match="mlx-runner pull org/name") as caught:
        locate("org/name", {"HF_HUB_CACHE": str(tmp_path)})
    assert str(tmp_path) in str(caught.value)
    assert caught.value.model == "org/name"


def test_the_error_for_a_commit_without_files_names_the_commit(tmp_path: Path) -> None:
    path = snapshot(tmp_path)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    with pytest.raises(ModelMissingError, match=COMMIT):
        locate("org/n", {"HF_HUB_CACHE": str(tmp_path)})


def test_a_file_is_refused_as_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelMissingError, match="is a file"):
        locate(str(path))


@pytest.mark.parametrize(
    "model",
    ["", "/no/such/place", "../no/such", "a/b/c", "x" * 5000, "a\0b", "~nobody-here", "~nobody/x"],
)
def test_any_other_name_is_not_found(tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelMissingError):
        locate(model, {"HF_HUB_CACHE": str(tmp_path)})
