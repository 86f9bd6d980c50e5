"""The kernels of a runner: no files of other users, and none cut short."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.server_child import DEADLINE_SECONDS, Child, running

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(
        mx.default_device() != mx.Device(mx.cpu), reason="only MLX on the CPU compiles with g++"
    ),
]

Build = Callable[..., Path]
OTHER_USER = 60001
VERSION: str = vars(mx)["__version__"]
PLANTED = """
#include <fstream>
__attribute__((constructor)) static void run() { std::ofstream("MARK") << "run"; }
"""


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Return an environment with kernel folders below ``tmp_path`` only."""
    for name in ("log", "tmp", "cache"):
        (tmp_path / name).mkdir()
    return {"TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def kernels_below(folder: Path) -> list[Path]:
    """Return the fused kernels below a folder."""
    return [file for file in folder.rglob("lib*.so") if "check" not in file.name]


def answer(child: Child) -> list[int]:
    """Generate three greedy tokens."""
    options = pb.CompletionOptions(num_predict=3, temperature=0, logit_bias={0: -100})
    request = pb.CompletionRequest(prompt="def", options=options)
    call = child.stub.Completion(request, timeout=DEADLINE_SECONDS)
    return [token for piece in call for token in piece.token_ids]


@contextmanager
def serving(
    folder: Path, folders: dict[str, str], code: str | None = None, **env: str
) -> Iterator[Child]:
    """Run a server with these folders for kernels."""
    variables = {**folders, **env}
    with running(folder / "log", "--listen", "127.0.0.1:0", code=code, **variables) as child:
        yield child


def test_kernels_of_a_killed_server_are_reused(
    tmp_path: Path, folders: dict[str, str], model_dir: Build
) -> None:
    with serving(tmp_path, folders) as child:
        child.load(model_dir())
        child.process.kill()
        child.wait()
    kept = {file.stat().st_ino for file in kernels_below(tmp_path / "tmp")}
    assert kept
    with serving(tmp_path, folders) as child:
        child.load(model_dir())
        child.process.terminate()
        assert child.wait() == 0
    assert {file.stat().st_ino for file in kernels_below(tmp_path / "tmp")} == kept
    assert not list((tmp_path / "tmp").glob("*/run-*"))
    assert not list((tmp_path / "tmp").rglob("*.cpp"))


def test_a_truncated_kernel_is_compiled_again(
    tmp_path: Path, folders: dict[str, str], model_dir: Build
) -> None:
    answers = []
    for _ in range(2):
        with serving(tmp_path, folders) as child:
            child.load(model_dir())
            answers.append(answer(child))
            child.process.terminate()
            child.wait()
        for kernel in kernels_below(tmp_path / "tmp"):
            kernel.write_bytes(kernel.read_bytes()[:3000])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_kernels_are_not_executed(
    tmp_path: Path, folders: dict[str, str], model_dir: Build
) -> None:
    shared, own = tmp_path / "tmp", tmp_path / "cache"
    with serving(tmp_path, folders) as child:
        child.load(model_dir())
        child.process.terminate()
        child.wait()
    names = {file.name for file in kernels_below(shared)}
    source, planted = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text(PLANTED.replace("MARK", str(tmp_path / "mark")))
    compiler = shutil.which("g++") or "g++"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", planted], check=True)
    # Plant files where MLX alone would look, and in this project's own folder.
    mlx = shared / "mlx" / VERSION / "cpu"
    mlx.mkdir(parents=True)
    for file in (*(mlx / name for name in names), *kernels_below(shared)):
        file.unlink(missing_ok=True)
        shutil.copy(planted, file)
    for file in shared.rglob("*"):
        os.chown(file, OTHER_USER, OTHER_USER)
    with serving(tmp_path, folders) as child:
        child.load(model_dir())
        assert len(answer(child)) == 3
    assert not (tmp_path / "mark").exists()
    assert {file.name for file in kernels_below(own)} >= names


IN_NOEXEC = 'mount -t tmpfs -o noexec,mode=1777 none "$0" && exec "$@"'


def _can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or not shutil.which("unshare"):
        return False
    command = ["unshare", "--mount", "sh", "-c", IN_NOEXEC, str(folder), "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


SERVER = """
import os, sys
os.execvp("unshare", ["unshare", "--mount", "sh", "-c", {mounts!r}, {folder!r},
          sys.executable, "-m", "runner_server", *sys.argv[1:]])
"""


@pytest.mark.parametrize("is_everywhere", [False, True])
def test_a_folder_mounted_noexec_is_not_used(
    tmp_path: Path, folders: dict[str, str], model_dir: Build, is_everywhere: bool
) -> None:
    """Without another folder, kernels are not fused and the log says why."""
    folder = tmp_path if is_everywhere else tmp_path / "tmp"
    model = model_dir()
    if not _can_mount(folder):
        pytest.skip("mount namespaces are not allowed here")
    code = SERVER.format(mounts=IN_NOEXEC, folder=str(folder))
    # The log lies below the folder, but was opened before the mount.
    with serving(tmp_path, folders, code, TMPDIR=str(folder)) as child:
        child.load(model)
        assert len(answer(child)) == 3
        child.process.terminate()
        assert child.wait() == 0
        log = child.log.read_text()
    assert ("not fused" in log) is is_everywhere
    if is_everywhere:
        assert f"{folder}" in log
        assert "noexec" in log


def test_a_broken_compiler_switches_fusing_off(
    tmp_path: Path, folders: dict[str, str], model_dir: Build
) -> None:
    (tmp_path / "bin").mkdir()
    gxx = tmp_path / "bin/g++"
    gxx.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no cc1plus"\nexit 1\n')
    gxx.chmod(0o755)
    path = os.pathsep.join((str(gxx.parent), os.environ["PATH"]))
    with serving(tmp_path, folders, PATH=path) as child:
        child.load(model_dir())
        assert len(answer(child)) == 3
        assert "not fused" in child.log.read_text()
        assert "no cc1plus" in child.log.read_text()
