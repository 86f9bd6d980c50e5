"""The entrance of the adapter: opens MLX on the engine's thread and counts memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runner_server.messages import LoadSpec, MemoryCounters

if TYPE_CHECKING:
    from runner_server.adapter.loading import MlxModel

_CACHE_LIMIT_BYTES = 1 << 30
"""Most memory MLX keeps for reuse; without a limit it keeps all it ever freed."""


class MlxBackend:
    """Implements ``runner_server.backend.Backend`` with MLX."""

    def __init__(self) -> None:
        self._mx: Any = None

    def open(self) -> str:
        """Imports MLX and mlx_lm; returns the device's name."""
        # Nothing is ever downloaded; without this transformers may try.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Late, because it takes a second or more in which calls are answered.
        import mlx.core as mx  # noqa: PLC0415

        import runner_server.adapter.loading  # noqa: F401, PLC0415

        mx.set_cache_limit(_CACHE_LIMIT_BYTES)
        self._mx = mx
        kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        return f"{kind}: {mx.device_info().get('device_name', 'unknown')}"

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> MlxModel:
        """Loads a model; see ``Backend.load``."""
        from runner_server.adapter.loading import load  # noqa: PLC0415 - as in open

        return load(spec, report)

    def memory(self) -> MemoryCounters:
        """What MLX holds; its counters may be read on any thread."""
        mx = self._mx
        if mx is None:
            return MemoryCounters()
        return MemoryCounters(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory())

    def release(self) -> None:
        """Gives freed memory back: Python's cycles, MLX's cache, the C heap."""
        gc.collect()
        if self._mx is not None:
            self._mx.clear_cache()
        if sys.platform == "linux":
            _trim_heap()

    def close(self) -> None:
        """Ends MLX on this thread; without it the exit of the process may abort."""
        if self._mx is None:  # it could not be imported
            return
        self._mx.synchronize()
        self._mx.clear_streams()


def _trim_heap() -> None:
    """Returns free pages of glibc's heap to the system; musl has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
