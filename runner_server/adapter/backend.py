"""The entrance of the adapter: opens MLX on the engine's thread and counts memory."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runner_server.messages import LoadSpec, MemoryCounters

if TYPE_CHECKING:
    from runner_server.adapter.loading import MlxModel
    from runner_server.adapter.sharding import Shard
    from runner_server.model_root import ModelRoot
    from runner_server.prefix import Held

logger = logging.getLogger(__name__)

_GPU_CACHE_LIMIT_BYTES = 1 << 30
"""Most memory MLX keeps for reuse; without a limit it keeps all it ever freed. On a CPU its
own 32 MiB stand: it reuses only what has nearly the size asked for, and the C library, which
gets the rest, can join pieces."""


class MlxBackend:
    """Implements ``runner_server.backend.Backend`` with MLX.

    Args:
        model_root: Where models must lie; None is anywhere.
        shard: This rank's part of what is loaded; None is all.
    """

    def __init__(self, model_root: ModelRoot | None = None, shard: Shard | None = None) -> None:
        self._model_root = model_root
        self._shard = shard
        self._mx: Any = None
        # Not the model itself: it must go with the last reference of the engine's thread.
        self._prompts_held: Held | None = None

    def open(self) -> str:
        """Imports MLX and mlx_lm; returns the device's name."""
        # Nothing is ever downloaded; without this transformers may try.
        os.environ["HF_HUB_OFFLINE"] = "1"
        # As mlx_lm has it where all of it is imported: no advice about PyTorch.
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Late, because it takes tenths of a second in which calls are answered.
        import mlx.core as mx  # noqa: PLC0415

        import runner_server.adapter.loading  # noqa: F401, PLC0415

        _choose_temporary_directory(mx)
        info = mx.device_info()
        # Metal only: what is not wired, the system may page out between two steps.
        if working_set := info.get("max_recommended_working_set_size"):
            mx.set_wired_limit(int(working_set))
        self._mx = mx
        kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        if kind == "gpu":
            mx.set_cache_limit(_GPU_CACHE_LIMIT_BYTES)
        return f"{kind}: {info.get('device_name', 'unknown')}"

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> MlxModel:
        """Loads a model; see ``Backend.load``."""
        from runner_server.adapter.loading import load  # noqa: PLC0415 - as in open

        model = load(spec, report, self._model_root, self._shard)
        self._prompts_held = model.prompts_held
        return model

    def memory(self) -> MemoryCounters:
        """What MLX holds; its counters may be read on any thread."""
        mx = self._mx
        if mx is None:
            return MemoryCounters()
        held = self._prompts_held
        return MemoryCounters(
            active_bytes=mx.get_active_memory(),
            cache_bytes=mx.get_cache_memory(),
            peak_bytes=mx.get_peak_memory(),
            prefix_cache_bytes=held.nbytes if held else 0,
        )

    def release(self) -> None:
        """Gives freed memory back: Python's cycles, MLX's cache, the C heap."""
        self._prompts_held = None
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


def _choose_temporary_directory(mx: Any) -> None:
    """Lets MLX compile kernels where files can be written; it looks at TMPDIR only."""
    try:
        os.environ["TMPDIR"] = tempfile.gettempdir()
    except FileNotFoundError as error:
        logger.warning("kernels are not compiled: %s", error.strerror)
        mx.disable_compile()


def _trim_heap() -> None:
    """Returns free pages of glibc's heap to the system; musl has no such call."""
    import ctypes  # noqa: PLC0415 - the server is ready sooner without it

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
