"""Recovery of MLX after an error on one of the stream threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.work import DecodeItem

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")


# Run in child processes, because nothing repairs MLX's state after such an error.
FORGET = """
import mlx.core as mx
from runner_server.mlx_backend.stream_errors import drain
raised = 0
for _ in range(20):
    try:
        mx.async_eval(mx.linalg.inv(mx.zeros((8, 8)), stream=mx.cpu))
    except RuntimeError:
        raised += 1
    drain()
    assert (mx.ones(4) * 2).sum().item() == 8
print("drained", raised)
"""

COUNT_UP = """
import mlx.core as mx
from runner_server.mlx_backend.stream_errors import active_tasks, drain, recover
from runner_server.engine.backend import BackendLost
recover()
if active_tasks() is None:
    raise SystemExit("skip")
while active_tasks() < 2:
    result = mx.linalg.inv(mx.zeros((8, 8)), stream=mx.cpu)
    # One in ten of the operations that follow is counted. It has to be enqueued after the error is
    # stored: with a single operation behind, that depends on which thread is faster.
    for _ in range(1000):
        result = mx.negative(result)
    try:
        mx.eval(result)
    except RuntimeError:
        drain()
try:
    recover()
except BackendLost as error:
    print(error)
"""


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_a_drained_error_is_not_raised_later() -> None:
    assert "drained" in _run(FORGET)


def test_a_stale_task_count_ends_the_engine() -> None:
    found = _run(COUNT_UP)
    if "skip" in found:
        pytest.skip("this MLX does not show its count of active tasks")
    assert "a count of 2 tasks that do not exist" in found


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_failing_step_recovers_mlx_in_a_single_process(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    drained: list[bool] = []
    monkeypatch.setattr("runner_server.mlx_backend.executor.recover", lambda: drained.append(True))
    failing: Any = tiny.new_executor()
    failing._agree = None if is_alone else lambda drawn: drawn
    failing._decode = _raise
    with pytest.raises(RuntimeError, match="in a step"):
        failing.run(DecodeItem())
    failing.close()
    assert drained == [True] * is_alone


def _raise(*_item: object) -> None:
    raise RuntimeError("in a step")
