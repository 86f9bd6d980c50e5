"""The first .gitignore covers the others: the sdist builder reads no other one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def paths_ignored_below() -> list[str]:
    """Return a path for each pattern of the other .gitignore files."""
    files = [*ROOT.glob("examples/**/.gitignore"), *ROOT.glob("tests/**/.gitignore")]
    own = [file for file in files if not {"target", "node_modules"} & {*file.parts}]
    return [
        f"{(file.parent / line.strip('/')).relative_to(ROOT)}{'/x' if line.endswith('/') else ''}"
        for file in own
        for line in file.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git on PATH")
def test_the_first_gitignore_covers_all_others(tmp_path: Path) -> None:
    paths = paths_ignored_below()
    assert len(paths) > 5
    shutil.copy(ROOT / ".gitignore", tmp_path)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    done = subprocess.run(
        [*git, "check-ignore", *paths], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.split() == paths
