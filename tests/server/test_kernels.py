"""Folders for compiled kernels: reuse by later processes, and removal."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner_server.host.compiler import CHECK_LIBRARY, CompilerError, check_compiler
from runner_server.host.kernel_folder import KernelFolder, NoKernelFolderError, open_kernels
from support.user_home import share_kernels

VERSION = "0.0"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Two folders fit for kernels."""
    (tmp_path / "tmp").mkdir()
    return {"TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def opened(environ: dict[str, str]) -> Iterator[KernelFolder]:
    """A folder with one compiled and loaded library."""
    folder = open_kernels(VERSION, check=check_compiler, environ=environ)
    yield folder
    folder.close()


def accept(_folder: Path) -> None:
    """Accept any folder."""


def libraries_at_start(environ: Mapping[str, str]) -> list[str]:
    """Return the libraries a new process starts with."""
    folder = open_kernels(VERSION, check=accept, environ=environ)
    found = [file.name for file in folder.libraries.iterdir()]
    folder.close()
    return found


def c_variable(name: str) -> str | None:
    """Return an environment variable as seen by C code."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    found = getenv(name.encode())
    return found.decode() if found is not None else None


@needs_compiler
def test_the_next_process_finds_a_kept_kernel(
    opened: KernelFolder, environ: dict[str, str]
) -> None:
    assert libraries_at_start(environ) == []
    opened.keep()
    assert libraries_at_start(environ) == [CHECK_LIBRARY]


@needs_compiler
def test_closing_keeps_kernels_and_removes_the_folder(environ: dict[str, str]) -> None:
    folder = open_kernels(VERSION, check=check_compiler, environ=environ)
    folder.close()
    assert not folder.libraries.exists()
    assert libraries_at_start(environ) == [CHECK_LIBRARY]


@needs_compiler
@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_kernel_cut_short_is_compiled_again(
    environ: dict[str, str], tmp_path: Path, size: int
) -> None:
    open_kernels(VERSION, check=check_compiler, environ=environ).close()
    (kept,) = tmp_path.rglob(CHECK_LIBRARY)
    # In another file: this process has mapped the old one, and would die of a bus error at exit.
    part = kept.read_bytes()[:size]
    kept.unlink()
    kept.write_bytes(part)
    assert libraries_at_start(environ) == []
    assert not kept.exists()
    open_kernels(VERSION, check=check_compiler, environ=environ).close()
    assert libraries_at_start(environ) == [CHECK_LIBRARY]


@needs_compiler
def test_a_kernel_that_could_not_be_loaded_is_dropped(
    opened: KernelFolder, environ: dict[str, str]
) -> None:
    """Drop the output of a killed linker, which MLX would try to load each time."""
    half = opened.libraries / "libhalf.so"
    half.write_bytes((opened.libraries / CHECK_LIBRARY).read_bytes()[:5000])
    opened.keep()
    assert not half.exists()
    assert libraries_at_start(environ) == [CHECK_LIBRARY]


@needs_compiler
def test_without_hard_links_kernels_are_copied(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    open_kernels(VERSION, check=check_compiler, environ=environ).close()
    assert libraries_at_start(environ) == [CHECK_LIBRARY]


@needs_compiler
def test_kernels_of_another_version_are_not_used(environ: dict[str, str]) -> None:
    open_kernels("0.1", check=check_compiler, environ=environ).close()
    assert libraries_at_start(environ) == []


def test_only_mlx_sees_the_folder(environ: dict[str, str]) -> None:
    """Leave the folder of temporary files of Python and of children as before."""
    before, python = c_variable("TMPDIR"), os.environ.get("TMPDIR")
    folder = open_kernels(VERSION, check=accept, environ=environ)
    folder.use()
    assert folder.libraries == Path(c_variable("TMPDIR") or "") / "mlx" / VERSION / "cpu"
    assert (c_variable("MLX_PTX_CACHE_DIR") or "").startswith(environ["TMPDIR"])
    assert os.environ.get("TMPDIR") == python
    folder.close()
    assert c_variable("TMPDIR") == before
    assert c_variable("MLX_PTX_CACHE_DIR") == os.environ.get("MLX_PTX_CACHE_DIR")


def test_kernels_of_one_run_only_are_removed(environ: dict[str, str], tmp_path: Path) -> None:
    folder = open_kernels(VERSION, check=accept, environ=environ, keeps=False)
    (folder.libraries / "libx.so").touch()
    folder.close()
    assert not list(tmp_path.rglob("*.so"))
    assert libraries_at_start(environ) == []


KILLED = """
import os, signal, sys
from runner_server.host.kernel_folder import open_kernels
print(open_kernels("0.0", check=lambda _: None).libraries, flush=True)
sys.stdin.read()
"""


def test_only_folders_of_dead_processes_are_removed(
    environ: dict[str, str],
) -> None:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env={**os.environ, **environ, **paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout
        libraries = Path(child.stdout.readline().strip())
        libraries_at_start(environ)
        assert libraries.is_dir()
        child.send_signal(signal.SIGKILL)
        child.wait()
    libraries_at_start(environ)
    assert not libraries.exists()


def shared_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder shared by the processes with this environment."""
    folder = open_kernels(VERSION, check=accept, environ=environ)
    shared = folder.libraries.parents[3]
    folder.close()
    return shared


@needs_compiler
def test_sessions_of_tests_share_kernels_but_not_the_folders_of_processes(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    shared, homes = tmp_path / "shared", [tmp_path / "one", tmp_path / "two"]
    shared.mkdir()
    folders = []
    for home in homes:
        share_kernels(home, shared)
        environ = {"XDG_CACHE_HOME": str(home / ".cache")}
        folders.append(open_kernels(mx.__version__, check=check_compiler, environ=environ))
        folders[-1].keep()
    first, second = (folder.libraries / CHECK_LIBRARY for folder in folders)
    assert first.parent != second.parent
    assert first.samefile(second), "it was compiled again"
    for folder in folders:
        folder.close()


def test_tmpdir_comes_before_the_cache_folder(environ: dict[str, str], tmp_path: Path) -> None:
    name = f"mlx-runner-kernels-{os.geteuid()}"
    assert shared_folder(environ) == tmp_path.resolve() / "tmp" / name
    del environ["TMPDIR"]
    assert shared_folder(environ) == tmp_path.resolve() / "cache/mlx-runner/kernels"


def test_without_a_home_the_folder_of_temporary_files_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run without HOME, like an arbitrary user id in a container."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert shared_folder({}) == tmp_path.resolve() / f"mlx-runner-kernels-{os.geteuid()}"
    assert (
        shared_folder({"HOME": str(tmp_path)}) == tmp_path.resolve() / ".cache/mlx-runner/kernels"
    )


def test_an_unfit_folder_is_skipped(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tmp" / f"mlx-runner-kernels-{os.geteuid()}").mkdir(mode=0o755)
    assert shared_folder(environ) == tmp_path.resolve() / "cache/mlx-runner/kernels"


@pytest.mark.parametrize("character", ['"', "$", "`", "\\"])
def test_a_path_that_a_shell_would_interpret_is_skipped(
    environ: dict[str, str], tmp_path: Path, character: str
) -> None:
    odd = tmp_path / f"a{character}b"
    odd.mkdir()
    environ["TMPDIR"] = str(odd)
    assert shared_folder(environ) == tmp_path.resolve() / "cache/mlx-runner/kernels"


def test_a_new_private_folder_is_the_last_resort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"mlx-runner-kernels-{os.geteuid()}").mkdir(mode=0o777)
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    folder = open_kernels(VERSION, check=accept, environ=environ)
    base = folder.libraries.parents[3]
    assert base.parent == tmp_path.resolve()
    assert base.stat().st_mode & 0o7777 == 0o700
    folder.close()
    assert not base.exists()


def test_without_any_fit_folder_the_error_names_each(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(f"{folder.parents[3]} is mounted noexec")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with pytest.raises(NoKernelFolderError) as caught:
        open_kernels(VERSION, check=refuse, environ=environ)
    assert str(tmp_path / "tmp") in str(caught.value)
    assert str(tmp_path / "cache") in str(caught.value)
    assert not list(tmp_path.rglob("run-*"))


def test_a_broken_compiler_is_tried_once(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g++").write_text(f"#!/bin/sh\necho x >>{tmp_path}/runs\necho 'no cc1plus'\nexit 3")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(CompilerError, match="exit code 3: no cc1plus"):
        open_kernels(VERSION, check=check_compiler, environ=environ)
    assert (tmp_path / "runs").read_text() == "x\n"
    assert not list(tmp_path.rglob("run-*"))


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    (tmp_path / CHECK_LIBRARY).write_bytes(b"no library")
    with pytest.raises(OSError, match=CHECK_LIBRARY):
        check_compiler(tmp_path)


def test_a_folder_mounted_noexec_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noexec = SimpleNamespace(f_flag=getattr(os, "ST_NOEXEC", 0) | 4096, f_bavail=9, f_frsize=9)
    monkeypatch.setattr(os, "ST_NOEXEC", 4096, raising=False)
    monkeypatch.setattr(os, "statvfs", lambda _: noexec)
    with pytest.raises(OSError, match="mounted noexec"):
        check_compiler(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse early; otherwise MLX raises at the first kernel without room."""
    full = SimpleNamespace(f_flag=0, f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(OSError, match="has 40960 bytes free; at least"):
        check_compiler(tmp_path)
    assert not list(tmp_path.iterdir())
