"""OpenBLAS in a runner: a thread count that suits the model, and no spinning threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from runner_client.host.environment import child_environment, find_blas
from runner_common.cores import usable_cores
from support.control_group import cpu_group, needs_cpu_group

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "runner_server/demo/model"
_CHILD = """
import ctypes, json, os, sys
from runner_server.mlx_backend import MlxBackend
from runner_server.engine.types import LoadSpec
blas = ctypes.CDLL(None)
backend = MlxBackend()
backend.open()
threads = []
for path in sys.argv[1:]:
    backend.load(LoadSpec(path, context_length=64), lambda _: None)
    threads.append(blas.openblas_get_num_threads())
backend.close()
print(json.dumps([threads, blas.openblas_get_num_procs(), os.environ["OPENBLAS_THREAD_TIMEOUT"]]))
"""


@pytest.fixture
def openblas() -> dict[str, str]:
    """Return the environment of a runner with OpenBLAS preloaded."""
    blas = find_blas()
    if blas is None or blas.name != "OpenBLAS":
        pytest.skip("no OpenBLAS is installed: apt-get install libopenblas0-pthread")
    clean = {key: value for key, value in os.environ.items() if "OPENBLAS" not in key}
    return child_environment(clean, backend="cpu", blas=str(blas.path))


def _threads(
    environment: Mapping[str, str], *models: Path, front: Sequence[str] = ()
) -> tuple[list[int], int, str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("proto", "."))
    child = subprocess.run(
        [*front, sys.executable, "-c", _CHILD, *map(str, models)],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    threads, cores, timeout = json.loads(child.stdout)
    return threads, cores, timeout


def test_a_small_model_uses_one_thread_and_a_large_one_all(
    openblas: dict[str, str], model_dir: Callable[..., Path]
) -> None:
    large = model_dir(hidden_size=512, intermediate_size=1024, vocab_size=4096)
    threads, cores, timeout = _threads(openblas, DEMO, large, DEMO)
    assert threads == [1, cores, 1]
    assert timeout == "4"


@needs_cpu_group
@pytest.mark.skipif(usable_cores().count < 2, reason="a quota of one core limits nothing here")
def test_a_cpu_quota_of_one_core_leaves_one_thread(
    openblas: dict[str, str], model_dir: Callable[..., Path]
) -> None:
    large = model_dir(hidden_size=512, intermediate_size=1024, vocab_size=4096)
    with cpu_group(1) as group:
        threads, cores, _ = _threads(openblas, large, front=group.command())
    assert cores > 1
    assert threads == [1]


def test_variables_set_by_the_user_are_kept(openblas: dict[str, str]) -> None:
    environment = {**openblas, "OPENBLAS_NUM_THREADS": "2", "OPENBLAS_THREAD_TIMEOUT": "20"}
    threads, _, timeout = _threads(environment, DEMO)
    assert threads == [2]
    assert timeout == "20"
