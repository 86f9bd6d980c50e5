"""MLX's own threads after an error: what they hold of it, and whether they can go on.

MLX 0.32 evaluates on a thread for each CPU stream. What raises there is stored and raised by
whatever is called next. Where that is the one in ten calls that is counted as an active task, the
count never comes down again, and from two on ``mx.eval`` may wait for a task that does not exist,
indefinitely. (``CommandEncoder::dispatch`` counts, then calls ``enqueue``, which raises.)

Read in the source of 0.32 and tried: these raise on a stream's thread, and nothing else does.

- A read of a file: 300 failing ones left a count of 10. They no longer happen
  (:mod:`runner_server.mlx_backend.loading.weight_files`).
- LAPACK (``mx.linalg.inv`` of a singular matrix: a count of 10 after 300). No model here uses it.
- ``mx.distributed`` over sockets. A rank that fails ends all of them anyway.
- The allocation of a kernel's small temporaries, when the C++ heap is exhausted.

What raises while a graph is built or scheduled (a shape, a kernel that g++ cannot compile) raises
in the call itself and leaves a count of 0; a large allocation that fails on a CPU ends the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from runner_server.engine.backend import BackendLost

_MOST_ERRORS = 100_000
"""More tasks than are ever begun; MLX is asked until it has no error left."""

_SCHEDULER = "_ZN3mlx4core9scheduler9schedulerEv"
"""``mlx::core::scheduler::scheduler()``; the object it returns begins with the count."""

_HARMLESS_TASKS = 1
"""MLX waits only where it counts more."""


def recover() -> None:
    """Prepare MLX for other work after an error on this thread.

    Raises:
        BackendLost: MLX may wait indefinitely from now on.
    """
    drain()
    left = active_tasks()
    # On a GPU, tasks that are under way count too.
    if left and left > _HARMLESS_TASKS and mx.default_device() == mx.Device(mx.cpu):
        raise BackendLost(
            f"errors inside MLX have left it a count of {left} tasks that do not exist, for which "
            "a later step may wait indefinitely; start the runner again"
        )


def drain() -> None:
    """Wait for the CPU stream's thread, and have MLX raise here what was stored on it."""
    for _ in range(_MOST_ERRORS):
        try:
            mx.synchronize(mx.default_stream(mx.cpu))
        except RuntimeError:
            continue
        return


def active_tasks() -> int | None:
    """MLX's count of active tasks; 0 after a :func:`drain`. None where it cannot be read."""
    scheduler = _scheduler()
    return int(scheduler()[0]) if scheduler else None


@cache
def _scheduler() -> Callable[[], Any] | None:
    for path in Path(mx.__file__).parent.glob("lib/libmlx.*"):
        with suppress(OSError, AttributeError):
            found: Any = getattr(ctypes.CDLL(str(path)), _SCHEDULER)
            found.restype = ctypes.POINTER(ctypes.c_int)
            return cast("Callable[[], Any]", found)
    return None
