"""The wheel and the sdist, installed in new environments: `make packages`."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.environments import LOWEST, NEWEST, ROOT, Environment, checked_output

Packages = tuple[Path, Path]
NewEnvironment = Callable[[], Environment]

BASE = ("click", "googleapis-common-protos", "grpcio", "protobuf", "psutil")

CLIENT = """
import importlib.util, sys
for name in ("mlx", "mlx_lm", "grpc_health", "pydantic"):
    assert importlib.util.find_spec(name) is None, name
from runner_client import RunnerClient
from runner_client.testing import fake_runner
with fake_runner() as runner, RunnerClient(runner.address) as client:
    print(client.complete("Hi").content)
"""

SERVER = """
import subprocess, sys
from importlib import resources
from runner_common.handshake import ReadyLine
from dataclasses import dataclass
from runner_client import JsonSchema, Options, RunnerClient

@dataclass
class Side:
    right: bool

model = str(resources.files("runner_server") / "demo/model")
command = [sys.executable, "-m", "runner_server", "--listen", "127.0.0.1:0", "--model", model]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
    try:
        line = ReadyLine.parse(child.stdout.readline())
        with RunnerClient(line.target) as client:
            while client.status().model is None:
                assert child.poll() is None
            print(client.complete("def main(", options=Options(num_predict=8)).eval_count)
            side = client.complete("side = ", constraint=JsonSchema(Side), options=Options(seed=1))
            assert isinstance(side.parse(Side), Side)
    finally:
        child.terminate()
        print(child.wait(30))
"""


def test_the_wheel_has_the_packages_the_stubs_and_the_demo_model(packages: Packages) -> None:
    names = zipfile.ZipFile(packages[0]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "mlxrunner",
        "runner_client",
        "runner_common",
        "runner_server",
    }
    for package in ("mlxrunner", "runner_client", "runner_common", "runner_server"):
        assert f"{package}/py.typed" in names
    stubs = ("runner_pb2.py", "runner_pb2.pyi", "runner_pb2_grpc.pyi", "pool_pb2_grpc.py")
    for name in ("runner.proto", "pool.proto", "runner.protoset", *stubs):
        assert f"mlxrunner/v1/{name}" in names
    assert "runner_server/demo/model/model.safetensors" in names
    assert sum(name.rpartition("/")[2].startswith("LICENSE") for name in names) >= 2
    assert packages[0].stat().st_size < 8 * 2**20


def test_the_sdist_has_the_files_for_its_tests(packages: Packages) -> None:
    with tarfile.open(packages[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"Makefile", "README.md", "LICENSE", "proto/mlxrunner/v1/runner.proto"} <= names
    assert {"tests/conftest.py", "tests/floor.txt", ".ci/run", "docs/architecture.md"} <= names
    assert {"proto/go/go.mod", "third_party/google/rpc/status.proto"} <= names


def test_the_packages_pass_the_checks_of_an_index(packages: Packages) -> None:
    said = checked_output(["twine", "check", "--strict", *packages], packages[0].parent)
    assert said.count("PASSED") == 2


@pytest.mark.parametrize("how", [LOWEST, NEWEST], ids=["lowest", "newest"])
def test_the_client_works_alone(
    packages: Packages, new_environment: NewEnvironment, how: tuple[str, ...]
) -> None:
    environment = new_environment()
    environment.install(str(packages[0]), *how)
    assert environment.run("-c", CLIENT) == "Hello world\n"
    if how is LOWEST:
        _assert_lowest_versions(environment, "")


@pytest.mark.parametrize("how", [LOWEST, NEWEST], ids=["lowest", "newest"])
def test_the_server_works(
    packages: Packages, new_environment: NewEnvironment, how: tuple[str, ...]
) -> None:
    environment = new_environment()
    environment.install(f"{packages[0]}[cpu,metrics,pydantic]", *how)
    assert environment.run("-c", SERVER).splitlines()[-2:] == ["8", "0"]
    command = environment.folder / "bin/mlx-runner"
    assert "has exited and is reaped (exit code 0)" in checked_output(
        [command, "demo"], environment.folder
    )
    if how is LOWEST:
        _assert_lowest_versions(environment, "server", "metrics", "pydantic")


def test_strict_type_checkers_find_no_errors(
    packages: Packages, new_environment: NewEnvironment
) -> None:
    environment = new_environment()
    environment.install(
        str(packages[0]), "mypy", "pyright[nodejs]", "types-grpcio", "types-protobuf"
    )
    program = environment.folder / "program.py"
    shutil.copy(ROOT / "tests/packages/program.py", program)
    assert "no issues" in environment.run("-m", "mypy", "--strict", program)
    config = {
        "include": ["program.py"],
        "typeCheckingMode": "strict",
        "venvPath": "..",
        "venv": "env",
    }
    (environment.folder / "pyrightconfig.json").write_text(json.dumps(config))
    said = environment.run("-m", "pyright", "--pythonpath", environment.python, timeout=300)
    assert "0 errors, 0 warnings" in said, said


def _assert_lowest_versions(environment: Environment, *extras: str) -> None:
    """Check that the installed versions are the lowest in the metadata."""
    installed = environment.versions()
    lines = environment.run(
        "-c", "import importlib.metadata as m; print(*m.requires('mlx-grpc-runner'), sep='\\n')"
    )
    for extra in extras:
        wanted = [
            requirement
            for requirement in map(Requirement, lines.splitlines())
            if not requirement.marker or requirement.marker.evaluate({"extra": extra})
        ]
        assert len(wanted) >= len(BASE)
        for requirement in wanted:
            floor = str(requirement.specifier).removeprefix(">=")
            assert installed[canonicalize_name(requirement.name)] == floor, requirement
