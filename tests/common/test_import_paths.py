"""PYTHONPATH for the children of a server that runs from a source checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner_common import import_paths


def test_import_paths_of_a_checkout_come_first() -> None:
    root = Path(__file__).parents[2]
    added = import_paths.with_import_paths({"PYTHONPATH": "/mine", "A": "b"})
    assert added["A"] == "b"
    assert added["PYTHONPATH"].split(os.pathsep) == [str(root), str(root / "proto"), "/mine"]


def test_installed_packages_are_not_put_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_paths, "_places", lambda _name: ["/usr/lib/python3/site-packages"])
    assert import_paths.with_import_paths({"A": "b"}) == {"A": "b"}
