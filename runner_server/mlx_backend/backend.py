"""The entry point of the MLX backend: opens MLX, loads models and reports memory."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runner_server.engine.load_admission import UNCHECKED, Admission
from runner_server.engine.types import LoadSpec, MemoryCounters
from runner_server.errors import InvalidField
from runner_server.host.heap import drop_code, settle_heap, trim_heap
from runner_server.mlx_backend.upstream.lean_import import forget_modules

if TYPE_CHECKING:
    from runner_server.engine.prefix_cache import CacheUsage
    from runner_server.engine.prefix_disk import DiskCounters, PrefixDiskSettings
    from runner_server.host.kernel_folder import KernelFolder
    from runner_server.host.model_root import ModelRoot
    from runner_server.mlx_backend.loading.mlx_model import MlxModel
    from runner_server.mlx_backend.sharding import Shard

_ARCHITECTURES = "mlx_lm.models"
"""Package whose submodules an unload forgets; each one keeps a fifth of a MiB."""

_LIBRARIES = ("libmlx", "tokenizers", "liblapack", "libblas")

_ANY_LIMIT_BYTES = 1 << 40
"""Any memory limit, set because MLX returns the previous limit only when a new one is set."""


class MlxBackend:
    """Implements ``runner_server.engine.backend.Backend`` with MLX.

    Args:
        model_root: The directory that models must be below; None allows any.
        shard: This rank's part of a model; None for the whole model.
        admission: Decides whether there is enough memory for a load.
        disk: The prefix cache on disk; None for models without one.
    """

    def __init__(
        self,
        model_root: ModelRoot | None = None,
        shard: Shard | None = None,
        admission: Admission = UNCHECKED,
        disk: PrefixDiskSettings | None = None,
    ) -> None:
        self._model_root = model_root
        self._shard = shard
        self._admission = admission
        self._disk = disk
        self._usual_limit_bytes = 0
        self._kept_modules: frozenset[str] = frozenset()
        self._mx: Any = None
        self._kernels: KernelFolder | None = None
        # Not a reference to the model, which must be freed when the engine's thread drops it.
        self._prompts: CacheUsage | None = None
        self._disk_counters: DiskCounters | None = None

    def open(self) -> str:
        """Import MLX and mlx_lm; return the kind and name of the device; see ``Backend.open``."""
        use_offline()
        settle_heap()
        # Imported late: it takes tenths of a second, in which the server already answers calls.
        import mlx.core as mx  # noqa: PLC0415

        import runner_server.mlx_backend.loading.loader  # noqa: F401, PLC0415
        from runner_server.mlx_backend.fusing import private_kernels  # noqa: PLC0415

        self._kernels = private_kernels()
        info = mx.device_info()
        # Metal only: between two steps, the system may page out memory that is not wired.
        if working_set := info.get("max_recommended_working_set_size"):
            mx.set_wired_limit(int(working_set))
        self._mx = mx
        self._kept_modules = frozenset(sys.modules)
        self._usual_limit_bytes = mx.set_memory_limit(_ANY_LIMIT_BYTES)
        mx.set_memory_limit(self._usual_limit_bytes)
        kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        return f"{kind}: {info.get('device_name', 'unknown')}"

    def check(self, spec: LoadSpec) -> None:
        """Check a model's files; see ``Backend.check``."""
        from runner_server.mlx_backend.loading.loader import check_files  # noqa: PLC0415 - as in open

        if self._shard and spec.draft_model:
            text = "several ranks hold the model together, which check no drafts"
            raise InvalidField([("draft_model", text)])
        check_files(spec, self._model_root)

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> MlxModel:
        """Load a model; see ``Backend.load``."""
        from runner_server.mlx_backend.loading.loader import load  # noqa: PLC0415 - as in open

        model = load(spec, report, self._model_root, self._shard, self._admission, self._disk)
        self._keep_kernels()
        self._prompts, self._disk_counters = model.prompts, model.disk_counters
        return model

    def memory(self) -> MemoryCounters:
        """Return MLX's memory counters. Thread-safe."""
        mx = self._mx
        if mx is None:
            return MemoryCounters()
        prompts, disk = self._prompts, self._disk_counters
        return MemoryCounters(
            active_bytes=mx.get_active_memory(),
            cache_bytes=mx.get_cache_memory(),
            peak_bytes=mx.get_peak_memory(),
            prefix_cache_bytes=prompts.nbytes if prompts else 0,
            prefix_cache_limit_bytes=prompts.limit_bytes if prompts else 0,
            disk=replace(disk) if disk else None,
        )

    def release(self, *, for_next: bool = False) -> None:
        """Free the memory of a model; see ``Backend.release``."""
        self._prompts = self._disk_counters = None
        forget_modules(_ARCHITECTURES, self._kept_modules)
        if self._mx is not None:
            self._mx.set_memory_limit(self._usual_limit_bytes)
        self.trim()
        drop_code(_LIBRARIES)
        # Kept if a load follows, so that no other process counts on this memory in between.
        if not for_next:
            self._admission.release()

    def trim(self) -> None:
        """Return freed memory to the system: from reference cycles, MLX's cache and the C heap."""
        gc.collect()
        if self._mx is not None:
            self._mx.clear_cache()
        self._keep_kernels()
        trim_heap()

    def close(self) -> None:
        """Release MLX's streams on this thread. Without this, the process may abort at exit."""
        if self._mx is None:  # MLX could not be imported
            return
        self._mx.synchronize()
        self._mx.clear_streams()
        if self._kernels:
            self._kernels.close()
            self._kernels = None

    def _keep_kernels(self) -> None:
        if self._kernels:
            self._kernels.keep()


def use_offline() -> None:
    """Keep transformers and tokenizers offline and quiet; call before they are imported."""
    # Otherwise transformers may try to download.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # No advice about PyTorch. mlx_lm sets this too, but only if all of it is imported.
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
