"""Recovery from errors on MLX's threads.

MLX 0.32 evaluates on a thread for each CPU stream. An error there is stored, and the next call
raises it. MLX counts one call in ten as an active task. If such a call fails, the count is never
decremented, and from a count of two on, ``mx.eval`` may wait indefinitely for a task that does not
exist. (``CommandEncoder::dispatch`` counts, then calls ``enqueue``, which raises.)

According to the source of 0.32 and to tests, only these raise on a stream's thread:

- A read of a file: 300 failed reads left a count of 10. Reads of weights no longer fail inside MLX
  (:mod:`runner_server.mlx_backend.loading.weight_files`).
- LAPACK (``mx.linalg.inv`` of a singular matrix: a count of 10 after 300). No model here uses it.
- ``mx.distributed`` over sockets. A rank that fails ends all of them anyway.
- The allocation of a kernel's small temporaries, when the C++ heap is exhausted.

An error while a graph is built or scheduled (a shape, a kernel that g++ cannot compile) raises in
the call itself and leaves a count of 0. A large allocation that fails on a CPU ends the process.
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
"""More errors than MLX can have stored, as an upper bound for :func:`drain`."""

_SCHEDULER = "_ZN3mlx4core9scheduler9schedulerEv"
"""``mlx::core::scheduler::scheduler()``, which returns an object that begins with the count."""

_HARMLESS_TASKS = 1
"""Highest count for which MLX does not wait."""


def recover() -> None:
    """Prepare MLX for further work after an error on this thread.

    Raises:
        BackendLost: A later call of MLX may wait indefinitely.
    """
    drain()
    left = active_tasks()
    # On a GPU, pending tasks count too.
    if left and left > _HARMLESS_TASKS and mx.default_device() == mx.Device(mx.cpu):
        raise BackendLost(
            f"errors inside MLX left a count of {left} tasks that do not exist, so that a later "
            "step may wait indefinitely; restart the runner"
        )


def drain() -> None:
    """Wait for the thread of the CPU stream, and discard the errors stored there."""
    for _ in range(_MOST_ERRORS):
        try:
            mx.synchronize(mx.default_stream(mx.cpu))
        except RuntimeError:
            continue
        return


def active_tasks() -> int | None:
    """Return MLX's count of active tasks, 0 after :func:`drain`; None if unreadable."""
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
