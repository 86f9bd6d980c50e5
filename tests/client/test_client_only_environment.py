"""The base install: the client and the base dependencies, in an environment without MLX."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

SCRIPT = """
import importlib.util
for name in ("mlx", "mlx_lm", "numpy", "transformers", "runner_server", "grpc_health", "pydantic"):
    assert importlib.util.find_spec(name) is None, name

from runner_client import NotSupportedError, RunnerClient, RunnerProcess
from runner_client.testing import fake_runner

with fake_runner() as runner, RunnerClient(runner.address) as client:
    print(client.complete("Hi").content)
try:
    RunnerProcess(MODEL).load()
except NotSupportedError as error:
    print(error)
"""


def base_distributions() -> set[str]:
    """Return the names of the dependencies installed by ``pip install mlx-grpc-runner``."""
    wanted = ["mlx-grpc-runner"]
    found: set[str] = set()
    while wanted:
        for line in importlib.metadata.requires(wanted.pop()) or ():
            requirement = Requirement(line)
            is_needed = not requirement.marker or requirement.marker.evaluate({"extra": ""})
            if is_needed and requirement.name not in found:
                found.add(requirement.name)
                wanted.append(requirement.name)
    return found


@pytest.fixture
def base_python(tmp_path: Path) -> Path:
    """Create an environment with the packages of the base install, linked to this one's."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for name in ("mlx-grpc-runner", *base_distributions()):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()}:
            # Skip this project's own packages and the .pth file of an editable install.
            wanted = name != "mlx-grpc-runner" or top.endswith(".dist-info")
            if wanted and top != ".." and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    for package in (ROOT / "runner_client", ROOT / "runner_common", ROOT / "proto/mlxrunner"):
        (packages / package.name).symlink_to(package)
    return tmp_path / "env/bin/python"


@pytest.mark.skipif(sys.platform == "win32", reason="links the packages of this environment")
def test_the_base_install_works_and_names_the_missing_extra(
    base_python: Path, tmp_path: Path
) -> None:
    script = SCRIPT.replace("MODEL", repr(str(ROOT / "runner_server/demo/model")))
    done = subprocess.run(
        [str(base_python), "-I", "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "Hello world"
    assert "pip install '.[cpu]'" in said[1]
