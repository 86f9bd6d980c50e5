"""Models Load may open when the server is confined to a directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from runner_server.config import parse_args
from runner_server.host.model_root import ModelRoot
from support.harness import Server, failure, running

RULE = "only directories below its --model-root"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder.resolve()


@pytest.fixture
def make_folder(tmp_path: Path, root: Path) -> Callable[[str], Path]:
    """Factory of directories with one file, below the root (``root/...``) or outside."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return folder

    assert root.is_dir()
    return make


MakeFolder = Callable[[str], Path]


def root_has(root: Path, model: Path) -> bool:
    return ModelRoot(root).has(model.resolve())


def test_directories_below_the_root_are_inside(root: Path, make_folder: MakeFolder) -> None:
    assert root_has(root, make_folder("root/model"))
    assert root_has(root, make_folder("root/org/name"))
    assert root_has(root, root)


def test_directories_beside_the_root_are_outside(
    root: Path, tmp_path: Path, make_folder: MakeFolder
) -> None:
    assert not root_has(root, make_folder("other/model"))
    # Only the beginning of the name is the root's.
    assert not root_has(root, make_folder("root-of-another"))
    assert not root_has(root, tmp_path)
    assert not root_has(root, root / ".." / "other" / "model")


def test_links_count_where_they_lead(root: Path, make_folder: MakeFolder) -> None:
    inside, outside = make_folder("root/model"), make_folder("other/model")
    (root / "in").symlink_to(inside)
    (root / "out").symlink_to(outside)
    (outside / "back").symlink_to(inside)
    assert root_has(root, root / "in")
    assert not root_has(root, root / "out")
    assert root_has(root, outside / "back")


def test_a_model_with_a_link_out_of_the_root_is_outside(
    root: Path, make_folder: MakeFolder
) -> None:
    """Follow the links of a model, which lead to blobs in the Hugging Face cache."""
    model, blobs, outside = (
        make_folder("root/m/snapshots/1"),
        make_folder("root/m/blobs"),
        make_folder("other"),
    )
    link = model / "model.safetensors"
    link.symlink_to(os.path.relpath(blobs / "config.json", model))
    assert root_has(root, model)
    link.unlink()
    link.symlink_to(outside / "config.json")
    assert not root_has(root, model)
    link.unlink()
    (model / "templates").mkdir()
    (model / "templates" / "deep").symlink_to(outside)
    assert not root_has(root, model)


def test_the_option_takes_an_existing_directory(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(root)
    assert parse_args(["--model-root", str(tmp_path / "link")]).model_root == root.resolve()
    assert parse_args([]).model_root is None
    with pytest.raises(SystemExit):
        parse_args(["--model-root", str(tmp_path / "none")])
    assert "is not a directory" in capsys.readouterr().err


@asynccontextmanager
async def confined(socket_dir: Path, root: Path) -> AsyncIterator[Server]:
    """Run a server with MLX, confined to models below ``root``."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    from runner_server.mlx_backend import MlxBackend

    backend: Any = MlxBackend(ModelRoot(root))
    async with running(socket_dir, backend) as (app, channel, ready):
        yield Server(app, backend, channel, ready)


@pytest.mark.mlx
async def test_load_opens_only_models_below_the_root(
    socket_dir: Path,
    root: Path,
    tmp_path: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = shutil.copytree(model_dir(), root / "good")
    outside = model_dir()
    (root / "link-out").symlink_to(outside)
    (root / "link-in").symlink_to(good)
    leaky = shutil.copytree(model_dir(), root / "leaky")
    (leaky / "tokenizer.json").unlink()
    (leaky / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    ring = shutil.copytree(model_dir(), root / "ring")
    (ring / "extra").symlink_to(ring / "extra")
    (root / "circle").symlink_to(root / "circle")
    refused = [
        str(ring),
        str(root / "circle"),
        str(outside),
        str(root / "link-out"),
        str(leaky),
        f"{root}/../{outside.name}",
        f"../{outside.parent.name}/{outside.name}",
        "/etc",
        "/etc/passwd",
        "/no/such/place",
        "~",
        "~nobody-of-that-name",
        str(root / "missing"),
        "org/not-in-the-cache",
    ]
    async with confined(socket_dir, root) as server:
        answers = set()
        for model in refused:
            problem = await failure(server.load(model))
            assert (problem.code, problem.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
            assert problem.metadata == {"model": model}
            assert RULE in problem.message
            answers.add(problem.message.replace(repr(model), ""))
        # The message does not reveal whether a path outside the root exists.
        assert len(answers) == 1
        for model in (str(root / "link-in"), "root/../root/good"):
            assert (await server.load(model)).model.path == str(good.resolve())


@pytest.mark.mlx
async def test_a_hub_id_is_opened_if_the_cache_is_below_the_root(
    socket_dir: Path,
    tmp_path: Path,
    root: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = root / "hub/models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    shutil.copytree(model_dir(), repository / "blobs")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "hub"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with confined(socket_dir, root) as server:
        loaded = await server.load("org/tiny")
        assert (loaded.model.name, loaded.model.path) == ("org/tiny", str(snapshot.resolve()))
    async with confined(socket_dir, elsewhere) as server:
        assert (await failure(server.load("org/tiny"))).reason == "MODEL_NOT_FOUND"
