"""The client's estimate is the plan of the server, computed in a child process and cached."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mlx = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

from runner_client.errors import (  # noqa: E402
    InsufficientMemoryError,
    InvalidRequestError,
    ModelUnsupportedError,
)
from runner_client.memory.estimation import estimate  # noqa: E402
from runner_server.engine.types import LoadSpec  # noqa: E402
from runner_server.mlx_backend.loading.loader import plan_load  # noqa: E402

Build = Callable[..., Path]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Record the processes started for estimates, with a cache folder of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands: list[Any] = []
    run = subprocess.run

    def counted(command: Any, *args: Any, **options: Any) -> Any:
        commands.append(command)
        return run(command, *args, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    return commands


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("options", [{}, {"parallel": 16, "context_length": 300}])
def test_the_estimate_equals_the_servers_plan(
    model_dir: Build, asked: list[Any], options: dict[str, Any]
) -> None:
    path = model_dir()
    found = estimate(str(path), **options)
    plan = plan_load(path, LoadSpec(str(path), **options))
    assert found.need.weight_bytes == plan.need.weight_bytes
    assert found.need.kv_bytes == plan.need.kv_bytes
    assert found.need.working_bytes == plan.need.working_bytes
    assert (found.notes, len(asked)) == ((), 1)


def test_an_estimate_is_cached_until_a_file_changes(
    model_dir: Build, asked: list[Any], tmp_path: Path
) -> None:
    path = copy_of(model_dir(), tmp_path / "model")
    first = estimate(str(path))
    assert estimate(str(path)) == first
    assert len(asked) == 1
    estimate(str(path), parallel=2)
    assert len(asked) == 2
    os.utime(path / "config.json", (1, 1))
    assert estimate(str(path)) == first
    assert len(asked) == 3


@pytest.fixture
def mkl(tmp_path: Path) -> Path:
    """A library whose name is that of MKL: a copy of the BLAS that comes with MLX."""
    own = next(Path(mlx.__file__).parents[1].glob("mlx_cpu.libs/libblas*"), None)
    if own is None:
        pytest.skip("this build of MLX carries no BLAS library of its own")
    (tmp_path / "lib").mkdir()
    # With the others in mlx_cpu.libs, which it needs.
    for file in own.parent.iterdir():
        shutil.copy(file, tmp_path / "lib" / file.name)
    return (tmp_path / "lib" / own.name).rename(tmp_path / "lib" / "libmkl_rt.so.3")


def test_an_estimate_counts_the_blas_of_the_runner(
    model_dir: Build, asked: list[Any], mkl: Path
) -> None:
    path = str(model_dir())
    without = estimate(path, blas="off")
    counted = estimate(path, blas=str(mkl))
    assert counted.process_bytes >= without.process_bytes + 32 * 2**20
    assert counted.need.working_bytes == without.need.working_bytes
    # The cache tells them apart.
    assert estimate(path, blas="off") == without
    assert len(asked) == 2


def test_a_damaged_cache_is_ignored(model_dir: Build, asked: list[Any], tmp_path: Path) -> None:
    first = estimate(str(model_dir()))
    for file in (tmp_path / "cache/mlx-runner/estimates").glob("*.json"):
        file.write_text("{")
    assert estimate(str(model_dir())) == first
    assert len(asked) == 2


@pytest.mark.usefixtures("asked")
def test_an_estimate_refuses_whatever_a_load_would_refuse(model_dir: Build, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        estimate(str(model_dir()), context_length=4096)
    assert caught.value.field_violations[0][0] == "context_length"
    with pytest.raises(InsufficientMemoryError, match="memory_limit_bytes") as short:
        estimate(str(model_dir()), memory_limit_bytes=1000)
    assert short.value.available_bytes == 1000
    assert (short.value.required_bytes or 0) > 1000
    path = copy_of(model_dir(), tmp_path / "model")
    (path / "config.json").write_text('{"model_type": "no_such_kind"}')
    with pytest.raises(ModelUnsupportedError, match="no_such_kind"):
        estimate(str(path))


def test_without_an_answer_of_the_process_the_headers_are_used(
    model_dir: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import os; os._exit(7)")
    found = estimate(str(model_dir()), env={**os.environ, "PYTHONPATH": str(broken)})
    assert "exit code 7" in found.notes[0]
    assert found.weight_bytes > 0
