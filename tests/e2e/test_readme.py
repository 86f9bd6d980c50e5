"""README and docs/python.md: the examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="starts real runners: needs the server extra")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs/python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README + LIBRARY, re.DOTALL | re.MULTILINE)


def test_there_are_five_python_examples() -> None:
    assert len(BLOCKS) == 5


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900


@pytest.mark.parametrize("block", BLOCKS, ids=["sync", "async", "library", "types", "watch"])
def test_the_examples_run(block: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
    assert not done.stderr
