"""Checks of MLX's count of active tasks, which must return to 0 after errors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from support.fakes import DEADLINE_SECONDS


def assert_no_tasks_left() -> None:
    """Synchronize MLX and check for tasks which are counted but do not exist.

    The engine of a server that several tests share may still compute its last step.
    """
    mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    from runner_server.mlx_backend.stream_errors import active_tasks

    mx.synchronize()
    end = time.monotonic() + DEADLINE_SECONDS
    while left := active_tasks():
        assert time.monotonic() < end, f"MLX counts {left} tasks"
        time.sleep(0.005)
    if left is None:
        pytest.skip("this MLX does not show its count of active tasks")


_COUNT_AFTER_LOADS = """
from runner_server.engine.thread import EngineThread
load = EngineThread._load

def counted(self, command):
    try:
        return load(self, command)
    finally:
        import mlx.core as mx
        from runner_server.mlx_backend.stream_errors import active_tasks
        mx.synchronize()
        with open({log!r}, "a") as log:
            print(active_tasks(), file=log)

EngineThread._load = counted
"""


class CountedLoads:
    """Record of a child's active tasks after every load.

    Args:
        folder: Folder for the record.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "active_tasks"
        self.code = _COUNT_AFTER_LOADS.format(log=str(self._log))
        """Code for the child to run first; see ``faulty.hooked``."""

    def assert_no_tasks_left(self, loads: int = 1) -> None:
        """Check the record of ``loads`` or more loads, and clear the record."""
        counts = self._log.read_text().split()
        self._log.unlink()
        if "None" in counts:
            pytest.skip("this MLX does not show its count of active tasks")
        assert len(counts) >= loads
        assert set(counts) == {"0"}
