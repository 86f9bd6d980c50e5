"""Opening of the prefix cache on disk for a loaded model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable

from mlx.nn.layers.base import Module

from runner_common.model_directory import ModelDirectory, text_part
from runner_common.units import format_bytes
from runner_server import __version__
from runner_server.engine.prefix_disk import BUFFERED_BLOCKS, BlockStore, PrefixDiskSettings
from runner_server.engine.prefix_disk.block_files import FORMAT_VERSION, HEADER_BYTES
from runner_server.errors import RunnerFault
from runner_server.host.private_folder import private_folder
from runner_server.mlx_backend.cache.blocks import BlockCodec
from runner_server.mlx_backend.cache.row_caches import CachePieces
from runner_server.mlx_backend.loading.mlx_model import MlxModel
from runner_server.mlx_backend.loading.model_digest import DigestedFiles
from runner_server.mlx_backend.planning.measure import device_kind
from runner_server.mlx_backend.planning.plan import Plan

logger = logging.getLogger(__name__)


class _UnusableError(Exception):
    """The prefix cache on disk cannot be used for a model."""


class PrefixDisk:
    """Prefix cache on disk of a model during the load.

    Create it before the weights are read, so that a file that changes meanwhile is noticed.

    Args:
        settings: The directory and its budget.
        directory: The model's files.
    """

    def __init__(self, settings: PrefixDiskSettings, directory: ModelDirectory) -> None:
        self._settings = settings
        self._directory = directory
        self._files = DigestedFiles.of(directory)

    def attach(
        self, model: MlxModel, module: Module, plan: Plan, beat: Callable[[], object]
    ) -> None:
        """Open the directory for a model, or add the reason to the model's warnings.

        Args:
            model: The loaded model.
            module: The same model, with its weights in memory.
            plan: The plan of its load.
            beat: Called while the files are read, which takes minutes for the largest models.

        Raises:
            RunnerFault: ``beat`` raised it, because the load was cancelled.
        """
        try:
            model.use_disk(*self._open(module, model.info.prefix_cache_bytes, plan, beat))
        except RunnerFault:
            raise
        except (_UnusableError, OSError) as why:
            self._refuse(model, str(why))
        except Exception as error:
            # Not even for a mistake in this code, which must not cost the model.
            logger.exception("the prefix cache on disk failed")
            self._refuse(model, f"{type(error).__name__}; the runner's log has the traceback")

    @staticmethod
    def _refuse(model: MlxModel, why: str) -> None:
        warning = f"the prefix cache on disk is not used: {why}"
        logger.warning("%s: %s", model.info.path, warning)
        model.warn(warning)

    def _open(
        self, module: Module, memory_bytes: int, plan: Plan, beat: Callable[[], object]
    ) -> tuple[BlockCodec, BlockStore, bytes]:
        pieces = CachePieces.of(module)
        if kinds := pieces.uncuttable:
            raise _UnusableError(f"it needs caches that can be cut, and this model has {kinds}")
        codec = BlockCodec(module, pieces)
        least = 2 * BUFFERED_BLOCKS * codec.block_bytes
        if memory_bytes < least:
            raise _UnusableError(
                f"the prefix cache in memory has {format_bytes(memory_bytes)}; it needs at least "
                f"{format_bytes(least)} to copy from and to disk"
            )
        if self._settings.budget_bytes < codec.block_bytes + HEADER_BYTES:
            raise _UnusableError(
                f"its {format_bytes(self._settings.budget_bytes)} are less than the "
                f"{format_bytes(codec.block_bytes)} of one block"
            )
        folder = private_folder(self._settings.directory)
        digest = self._files.digest(folder, beat)
        if digest is None:
            raise _UnusableError("the model's files were changed during the load")
        key = self._key(digest, codec, plan)
        return codec, BlockStore(folder, self._settings.budget_bytes, codec.block_bytes), key

    def _key(self, digest: str, codec: BlockCodec, plan: Plan) -> bytes:
        """Return the digest of all inputs of the keys and values except the tokens.

        The versions are part of it because a release may correct how a model is computed, the kind
        of device because its rounding differs; and with scaled rotary embeddings the context,
        which selects the factors of LongRoPE.
        """
        from importlib import metadata  # noqa: PLC0415 - slow, and few servers have a disk cache

        is_scaled = "rope_scaling" in text_part(self._directory.configuration.values)
        parts = {
            "format": FORMAT_VERSION,
            "files": digest,
            "dtype": plan.dtype.value,
            "layout": codec.layout,
            "context": plan.context_length if is_scaled else None,
            "device": device_kind(),
            "runner": __version__,
            "mlx": metadata.version("mlx"),
            "mlx-lm": metadata.version("mlx-lm"),
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=32).digest()
