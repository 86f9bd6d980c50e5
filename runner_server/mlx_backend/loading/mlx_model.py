"""A loaded model, as the engine sees it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx.nn.layers.base import Module

from runner_common.contract import MAX_DRAFT
from runner_common.model_directory import ModelDirectory
from runner_server.engine.embedding.types import EmbeddingInfo
from runner_server.engine.prefill_queue import PrefillLimits
from runner_server.engine.prefix_cache import CacheUsage, PrefixCache
from runner_server.engine.prefix_disk import (
    BUFFERED_BLOCKS,
    BlockStore,
    DiskCounters,
    DiskTier,
)
from runner_server.engine.speculation.pace import FEWEST
from runner_server.engine.types import DraftInfo, ModelInfo
from runner_server.errors import InvalidField
from runner_server.mlx_backend.adapters.selection import NO_ADAPTERS, Attached
from runner_server.mlx_backend.adapters.trial import require_finite, try_mixed
from runner_server.mlx_backend.batch_budget import BatchBudget
from runner_server.mlx_backend.cache.blocks import BlockCodec
from runner_server.mlx_backend.cache.row_caches import CachePieces
from runner_server.mlx_backend.constraints.grammars import GrammarCache
from runner_server.mlx_backend.embedding.trial import TextTrial, try_texts
from runner_server.mlx_backend.executor import (
    MlxDiskTier,
    MlxExecutor,
    MlxPrefixCache,
)
from runner_server.mlx_backend.loading.batch_trial import tolerance, try_together
from runner_server.mlx_backend.loading.draft_trial import try_drafts
from runner_server.mlx_backend.loading.kv_trial import try_quantized
from runner_server.mlx_backend.loading.trial import warm_up
from runner_server.mlx_backend.model.kv_bits import refusal
from runner_server.mlx_backend.planning.measure import PREFILL_CHUNK, ROWS_TOGETHER, device_kind
from runner_server.mlx_backend.planning.plan import Plan, alone_warning
from runner_server.mlx_backend.speculation.proposer import DraftModel
from runner_server.mlx_backend.stream_errors import recover
from runner_server.mlx_backend.tokenizer.codec import FastCodec

if TYPE_CHECKING:
    from runner_server.mlx_backend.sharding import Shard

logger = logging.getLogger(__name__)

_SAVE_WAIT_SECONDS = 0.005
"""Longest wait for the thread that writes prefixes to disk. A new request waits as long."""

_CLOSE_SECONDS = 1.0
"""Longest wait at the end for each of copying and writing the rest of the prefix cache."""


class MlxModel:
    """Implements ``runner_server.engine.backend.LoadedModel``.

    Args:
        model: The model, with its weights in memory.
        codec: The model's tokenizer.
        info: The model's description, and the limits in force.
        plan: The plan made before reading the weights.
        shard: This rank's part of the model; None for the whole model.
        directory: The model's files.
        adapters: The model's adapters.
    """

    def __init__(
        self,
        model: Module,
        codec: FastCodec,
        info: ModelInfo,
        plan: Plan,
        shard: Shard | None,
        directory: ModelDirectory,
        adapters: Attached = NO_ADAPTERS,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._plan = plan
        self._shard = shard
        self._pieces = CachePieces.of(model)
        self._prompts: MlxPrefixCache = PrefixCache(self._pieces, info.prefix_cache_bytes)
        self._takes_drafts = False
        self._disk: MlxDiskTier | None = None
        self._store: BlockStore | None = None
        self.codec = codec
        self.grammars = GrammarCache(codec, info.vocab_size, info.eos_token_ids)
        self.info = replace(info, takes_constraints=not self.grammars.problem)
        self._directory = directory
        self._texts = TextTrial(problem="the model has not been tried yet")
        self._draft_model: DraftModel | None = None

    @property
    def kv_bytes(self) -> Callable[[int], int]:
        """Function from tokens to bytes; see ``LoadedModel.kv_bytes``."""
        return self._plan.kv_bytes

    @property
    def prompts(self) -> CacheUsage:
        """Byte counters of the prefix cache."""
        return self._prompts.usage

    @property
    def disk_counters(self) -> DiskCounters | None:
        """Counters of the prefix cache on disk; None without one."""
        return self._store.counters if self._store else None

    def use_disk(self, codec: BlockCodec, store: BlockStore, key: bytes) -> None:
        """Copy the prefix cache to a directory from now on, and read prefixes from there.

        The memory of the blocks being copied is taken from the prefix cache.
        """
        self._disk, self._store = DiskTier(self._prompts, codec, store, key), store
        left = self.info.prefix_cache_bytes - BUFFERED_BLOCKS * codec.block_bytes
        self.info = replace(self.info, prefix_cache_bytes=left)
        self.limit_prefix_cache(left)

    def use_draft_model(self, draft_model: DraftModel, info: DraftInfo) -> None:
        """Let a draft model propose tokens from now on."""
        self._draft_model = draft_model
        self.info = replace(self.info, draft=info)

    def require_drafts(self) -> None:
        """Raise :class:`InvalidField` if the model checks no drafts of its draft model."""
        if self.max_draft < FEWEST:
            text = "this model checks no drafts: the runner's log says why"
            if self._takes_drafts:
                text = "the working memory of this load has no room for drafts"
            raise InvalidField([("draft_model", text)])

    def warn(self, warning: str) -> None:
        """Add a warning to the description."""
        self.info = replace(self.info, warnings=(*self.info.warnings, warning))

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Change the byte budget of the prefix cache; see ``LoadedModel.limit_prefix_cache``."""
        self._prompts.limit(limit_bytes)

    def save_prefixes(self, *, is_idle: bool) -> bool:
        """Copy a part of the prefix cache for the disk; see ``LoadedModel.save_prefixes``."""
        if self._disk is None:
            return False
        try:
            return self._disk.save_some(_SAVE_WAIT_SECONDS if is_idle else 0.0)
        except Exception:
            # Without memory for the copy, for example, which is no reason to end requests.
            recover()
            logger.exception("prefixes cannot be copied to disk")
            self._disk.drop_noted()
            return False

    def close(self) -> None:
        """Write the rest of the prefix cache to disk; see ``LoadedModel.close``."""
        if self._disk and self._store:
            until = time.monotonic() + _CLOSE_SECONDS
            while time.monotonic() < until and self.save_prefixes(is_idle=True):
                pass
            self._store.close(_CLOSE_SECONDS)

    @property
    def prefill_limits(self) -> PrefillLimits:
        """Limits of prefill chunks; see ``LoadedModel.prefill_limits``."""
        chunk = PREFILL_CHUNK[device_kind()]
        return PrefillLimits(
            max_chunk=chunk,
            max_tokens=ROWS_TOGETHER * chunk,
            max_logits=self._plan.max_logits,
            can_pad=self._pieces.can_pad,
            max_texts=self._budget.max_texts_together if self._texts.can_join else _alone,
            needs_snapshot=self._pieces.needs_snapshot,
            max_prompts=self._budget.max_prompts_together,
        )

    @property
    def max_draft(self) -> int:
        """Most tokens of a draft; see ``LoadedModel.max_draft``."""
        return min(MAX_DRAFT, self._plan.max_drawn - 1) if self._takes_drafts else 0

    def new_executor(self) -> MlxExecutor:
        """Return an executor without rows."""
        return self._executor(self._prompts, self._disk)

    def warm_up(self) -> None:
        """Generate a token, and try rows together, drafts and texts to embed.

        If rows cannot be decoded together, ``parallel`` becomes 1. Also compiles the kernels, for
        which the first request would have to wait.

        Raises:
            InvalidField: The model computes something else with quantized keys and values.
            RunnerFault: See :func:`~runner_server.mlx_backend.loading.trial.warm_up`.
        """
        info = self.info
        executor = self._executor(PrefixCache(self._pieces, 0))
        warm_up(self._model, executor, info.vocab_size, info.dtype)
        self._try_quantized()
        require_finite(self._model, self._pieces.new, self._adapters)
        self._try_texts()
        if self._shard:
            return
        self._try_drafts()
        info = self.info
        if info.parallel == 1:
            return
        arguments = self._model, self._pieces, info.vocab_size, info.parallel
        if why := try_together(*arguments) or try_mixed(*arguments, self._adapters):
            warning = alone_warning(info.architecture, why)
            logger.warning("%s: %s", info.path, warning)
            self.info = replace(info, parallel=1)
            self.warn(warning)

    def _try_quantized(self) -> None:
        if not self.info.kv_bits:
            return
        if why := try_quantized(self._model, self._pieces, self.info.vocab_size):
            raise refusal(self.info.architecture, why)

    def _try_drafts(self) -> None:
        if self._pieces.needs_snapshot:
            return
        why = try_drafts(self._model, self._pieces, self.info.vocab_size)
        if why:
            logger.warning("%s: tokens are not drafted: %s", self.info.path, why)
        self._takes_drafts = not why

    def _try_texts(self) -> None:
        """Find out whether the model embeds texts, by its files and a trial."""
        files, info = self._directory.embedding, self.info
        self._texts = try_texts(
            self._model,
            self._pieces.new,
            files,
            vocab_size=info.vocab_size,
            tolerance=tolerance(self._model),
        )
        if info.kv_bits:
            # Texts that share a call have no caches, so that their keys are not quantized.
            self._texts = replace(self._texts, can_join=False)
        limit = files.max_tokens or info.context_length
        embedding = EmbeddingInfo(
            dimension=self._texts.dimension,
            max_tokens=min(limit, info.context_length) if self._texts.model else 0,
            is_file_limit=limit < info.context_length,
            problem=self._texts.problem,
        )
        self.info = replace(info, embedding=embedding)

    def _executor(self, prompts: MlxPrefixCache, disk: MlxDiskTier | None = None) -> MlxExecutor:
        agree = self._shard.agree if self._shard else None
        return MlxExecutor(
            self._model,
            self.info.vocab_size,
            self._pieces,
            prompts,
            agree=agree,
            budget=self._budget,
            disk=disk,
            texts=self._texts.model,
            adapters=self._adapters,
            draft_model=self._draft_model,
        )

    @property
    def _budget(self) -> BatchBudget:
        plan = self._plan
        return BatchBudget(
            self.info.kv_budget_bytes,
            plan.need.working_bytes,
            plan.kv_bytes,
            plan.chunk_bytes,
            plan.buffer_cache_bytes,
        )


def _alone(_length: int) -> int:
    return 1
