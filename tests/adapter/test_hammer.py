"""Many failing reads followed by many steps, after which MLX must not hang.

With ``HAMMER=1``, 5,000 reads fail and 1,000,000 steps follow, which takes 15 minutes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.engine.backend import LoadedModel  # noqa: E402
from runner_server.engine.types import LoadSpec  # noqa: E402
from runner_server.errors import ModelUnsupported  # noqa: E402
from runner_server.mlx_backend import MlxBackend  # noqa: E402
from support.mlx_tasks import assert_no_tasks_left  # noqa: E402
from support.rows import Row, run_rows  # noqa: E402
from tools.local_batch import LocalBatch  # noqa: E402

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]
IS_WHOLE = bool(os.environ.get("HAMMER"))
FAILING_READS = 5000 if IS_WHOLE else 140
STEPS = 1_000_000 if IS_WHOLE else 5000


class Disk:
    """Replacement of ``os.preadv`` which fails from the n-th read on.

    Attributes:
        good_reads: Number of reads left to succeed.
        shrinks: Whether a read fails as if the file had shrunk, rather than by EIO.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.good_reads = 0
        self.shrinks = False
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self._read)

    def _read(self, file: int, buffers: Any, offset: int, *flags: int) -> int:
        self.good_reads -= 1
        if self.good_reads >= 0:
            return self._preadv(file, buffers, offset, *flags)
        if self.shrinks:
            return 0
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.timeout(1800 if IS_WHOLE else 180)
def test_failing_reads_leave_no_active_tasks_in_mlx(
    backend: MlxBackend, load: Load, model_dir: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_dir(num_hidden_layers=1)
    disk = Disk(monkeypatch)
    for attempt in range(FAILING_READS):
        disk.good_reads, disk.shrinks = attempt % 7, bool(attempt % 2)
        with pytest.raises(ModelUnsupported, match="while it was read"):
            backend.load(LoadSpec(str(path), context_length=16), lambda _progress: None)
    assert_no_tasks_left()
    monkeypatch.undo()
    _steps(STEPS)
    assert_no_tasks_left()
    assert run_rows(LocalBatch.of(load(path)), [Row([1, 2, 3], 5)])[0]


def _steps(count: int) -> None:
    """Run decode-like steps: each is begun before the result of the last one is read."""
    weight = mx.random.normal((16, 16))
    state = mx.zeros((1, 16))
    for step in range(count):
        state = mx.tanh(state @ weight + 1)
        mx.async_eval(state)
        if step % 50 == 0:
            mx.eval(state)
    mx.eval(state)
