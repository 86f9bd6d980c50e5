"""Fixtures: the built packages, and new environments."""

from __future__ import annotations

import shutil
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.environments import ROOT, Environment, checked_output
from support.user_home import toolchain_variables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session", autouse=True)
def _user_toolchains() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in toolchain_variables().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the sdist from a clean copy, and the wheel from the sdist; return wheel and sdist."""
    folder = tmp_path_factory.mktemp("packages")
    listed = checked_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT
    )
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "copy" / name)
    checked_output([sys.executable, "-m", "build", "--outdir", folder / "dist"], folder / "copy")
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[], Environment]:
    """Return a factory of environments with only pip."""

    def make() -> Environment:
        venv.create(tmp_path / "env", with_pip=True)
        return Environment(tmp_path / "env")

    return make
