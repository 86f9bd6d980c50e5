"""Lock files of clients in other languages name no registry."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [*(ROOT / "tests/interop/clients").iterdir(), *(ROOT / "examples").iterdir()]
NPM = list(chain.from_iterable(folder.glob("package-lock.json") for folder in FOLDERS))
CARGO = list(chain.from_iterable(folder.glob("Cargo.toml") for folder in FOLDERS))


def test_there_are_lock_files_to_check() -> None:
    assert NPM
    assert CARGO


@pytest.mark.parametrize("lock", NPM, ids=lambda path: path.parent.name)
def test_npm_locks_name_no_registry(lock: Path) -> None:
    packages = json.loads(lock.read_text())["packages"]
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert [name for name, package in packages.items() if name and "integrity" not in package] == []


@pytest.mark.parametrize("manifest", CARGO, ids=lambda path: path.parent.name)
def test_cargo_locks_are_ignored(manifest: Path) -> None:
    # Cargo.lock names the registry of each package.
    ignored = (manifest.parent / ".gitignore").read_text().split()
    assert {"Cargo.lock", "/Cargo.lock"} & set(ignored)
