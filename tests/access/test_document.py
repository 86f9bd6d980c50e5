"""Tests named in docs/security.md exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_named_test_exists() -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")}
    functions = set(re.findall(r"def (test_\w+)\(", "\n".join(files.values())))
    named = set(re.findall(r"\btest_\w+(?:\.py)?", DOCUMENT))
    assert len(named) > 10
    assert {name for name in named if name.endswith(".py")} <= files.keys()
    assert {name for name in named if not name.endswith(".py")} <= functions
