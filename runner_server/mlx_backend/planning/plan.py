"""Plan of a load: limits and memory need, decided before any weights are read.

This is the only formula for a model's memory. Loads use it for admission and limits, and the
estimates of the client and of the ``Estimate`` rpc use it through
:mod:`runner_server.mlx_backend.estimating`. It imports no MLX: the numbers come from
:mod:`runner_server.mlx_backend.planning.measure`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from runner_common.contract import DEFAULT_CONTEXT_LENGTH
from runner_common.memory.need import MemoryNeed
from runner_common.units import format_bytes
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import InsufficientMemory, InvalidField
from runner_server.mlx_backend.model.differences import Exactness
from runner_server.mlx_backend.planning.sizes import ModelSizes, Probe

_MIB = 1 << 20

_BUFFER_CACHE_BYTES = {"cpu": (4 * _MIB, 32 * _MIB), "gpu": (64 * _MIB, 1024 * _MIB)}
"""Minimum and maximum of the freed buffers that MLX keeps for reuse. In a soak test on a CPU, more
than 32 MiB only let the process grow, because the C heap reuses blocks for other sizes and MLX does
not. 32 MiB is also MLX's own limit there."""

_PREFIX_SHARE = 4
"""The default prefix cache holds one sequence, or a quarter of the memory of all sequences."""

_TOGETHER_BYTES = 64 * _MIB
"""Memory for prefilling several prompts in one call; a 32nd of the weights is added."""

_WORKING_SLACK = 1.15
"""Factor on traced bytes. MLX's measured peaks were up to 1.17 times the traced bytes with
``set_memory_limit`` at that size."""


@dataclass(frozen=True)
class Plan:
    """The decisions of a load before reading weights; see ``ModelInfo``.

    Attributes:
        dtype: The dtype of the weights; never AUTO.
        probe: The shapes of the model's caches.
        max_context_length: The longest sequence that the model supports, in tokens.
        context_length: The longest sequence of this load, in tokens.
        parallel: Most requests decoded together: the requested number, fewer if a memory limit
            leaves no room for their decode step, and 1 if the model does not support batches.
        need: The memory needed, part by part.
        kv_budget_bytes: Most bytes for the KV caches of all running requests.
        buffer_cache_bytes: Most bytes of freed buffers that MLX keeps for reuse.
        token_bytes: Bytes of working memory per token of a prefill chunk.
        pair_bytes: Bytes of working memory per pair of a token and a token that it attends to.
        logits_bytes: Bytes of working memory per token whose log probabilities are computed.
        row_bytes: Bytes of working memory per sequence of a decode step.
        warnings: Differences between the model's answers and the specification in its files.
    """

    dtype: Dtype
    probe: Probe
    max_context_length: int
    context_length: int
    parallel: int
    need: MemoryNeed
    kv_budget_bytes: int
    buffer_cache_bytes: int
    token_bytes: float
    pair_bytes: float
    logits_bytes: int
    row_bytes: float
    warnings: tuple[str, ...] = ()

    def chunk_bytes(self, tokens: int, before: int) -> float:
        """Return the bytes of working memory to prefill ``tokens`` after ``before`` others."""
        return tokens * (self.token_bytes + self.pair_bytes * (before + tokens))

    @property
    def max_logits(self) -> int:
        """Most tokens of a chunk with log probabilities that fit the working memory, at least 1."""
        token = self.token_bytes + self.pair_bytes * self.context_length + self.logits_bytes
        return self._most_within(token)

    @property
    def max_drawn(self) -> int:
        """Most tokens to draw together for one sequence within the working memory, at least 1.

        Each takes as much as a sequence of a decode step at most.
        """
        return self._most_within(self.row_bytes)

    def _most_within(self, each_bytes: float) -> int:
        """Return how many of something fit the working memory, at least 1."""
        arrays = self.need.working_bytes - self.buffer_cache_bytes
        return max(1, int(arrays / (_WORKING_SLACK * max(1, each_bytes))))

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of KV cache for one sequence."""
        return self.probe.kv_bytes(tokens)

    @property
    def limit_bytes(self) -> int:
        """Most bytes MLX may hold."""
        return self.need.mlx_bytes

    @property
    def share(self) -> float:
        """Number of full-length sequences within the KV budget."""
        return self.kv_budget_bytes / max(1, self.kv_bytes(self.context_length))

    def with_share(self, share: float) -> Plan:
        """Return a plan with the KV budget lowered to at most ``share`` sequences."""
        budget = min(self.kv_budget_bytes, int(share * self.kv_bytes(self.context_length)))
        return replace(self, kv_budget_bytes=budget)

    def within(self, granted_bytes: int) -> Plan:
        """Return a plan whose prefix cache, if of the default size, fits the granted memory."""
        if not self.need.has_default_prefix_cache:
            return self
        rest = max(0, granted_bytes - self.need.required_bytes)
        kept = min(self.need.prefix_cache_bytes, rest)
        return replace(self, need=replace(self.need, prefix_cache_bytes=kept))

    def with_draft(self, draft: Plan) -> Plan:
        """Return a plan that includes the memory of a draft model."""
        return replace(self, need=self.need.with_draft(draft.need))

    def settled(self, spec: LoadSpec) -> LoadSpec:
        """Return the load with this plan's decisions in place of every automatic choice."""
        return replace(
            spec,
            dtype=self.dtype,
            parallel=self.parallel,
            context_length=self.context_length,
            prefix_cache_bytes=self.need.prefix_cache_bytes,
        )


def formats(dtype: Dtype, device: str) -> tuple[Dtype, ...]:
    """Return the dtypes to try for a requested one on a kind of device, in order."""
    automatic = Dtype.FLOAT32 if device == "cpu" else Dtype.AS_STORED
    if dtype is Dtype.AUTO:
        return (automatic,)
    if dtype is Dtype.AUTO_OR_STORED:
        return tuple(dict.fromkeys((automatic, Dtype.AS_STORED)))
    return (dtype,)


def alone_warning(model_type: str, why: str) -> str:
    """Return the warning for a model whose requests run one after another."""
    return (
        f"completions run one after another, whatever `parallel` says: mlx_lm does not decode "
        f"several sequences of a {model_type!r} model together correctly ({why})"
    )


def require_context(context_length: int, longest: int) -> None:
    """Raise :class:`InvalidField` if a context is longer than ``longest``, in tokens."""
    if context_length > longest:
        text = f"{context_length} is more than the {longest} tokens this model can handle"
        raise InvalidField([("context_length", text)])


def context_in_force(spec: LoadSpec, longest: int, exactness: Exactness) -> int:
    """Return the longest sequence of a load, in tokens.

    Args:
        spec: The load.
        longest: The longest sequence that the model supports.
        exactness: The known differences. The default context avoids those of long sequences only.

    Raises:
        InvalidField: The requested context is longer than the model supports; or without
            ``allow_inexact``, too long to be exact.
    """
    exact = exactness.length or longest
    if spec.context_length is None:
        return min(longest, exact, DEFAULT_CONTEXT_LENGTH)
    require_context(spec.context_length, longest)
    if spec.context_length > exact and not spec.allow_inexact:
        causes = "; ".join(each.text for each in exactness.differences)
        text = (
            f"{spec.context_length} is more than the {exact} tokens up to which this model is "
            f"computed as its files say ({causes}); ask for at most that, or allow_inexact"
        )
        raise InvalidField([("context_length", text)])
    return spec.context_length


def make_plan(
    spec: LoadSpec,
    sizes: ModelSizes,
    max_context_length: int,
    warnings: tuple[str, ...] = (),
    transit_tokens: int = 0,
    draft_bytes: int = 0,
) -> Plan:
    """Plan a load.

    Args:
        spec: The load, with one of the dtypes of :func:`formats`.
        sizes: The sizes of the model in that dtype.
        max_context_length: The longest sequence that the model supports, in tokens.
        warnings: Differences between the model's answers and the specification in its files.
        transit_tokens: Tokens on their way to or from disk, which are part of the prefix cache.
        draft_bytes: Memory of a draft model, which ``memory_limit_bytes`` includes.

    Raises:
        InsufficientMemory: ``memory_limit_bytes`` is too small for one sequence.
    """
    # Cached, because each call traces a decode step.
    decode_bytes = cache(sizes.decode_bytes)
    sizes = replace(sizes, decode_bytes=decode_bytes)
    budget = _Budget(spec, sizes, transit_tokens, draft_bytes)
    rows = budget.rows_that_fit()
    parallel = budget.parallel_that_fits(rows)
    kv = budget.kv(rows, parallel)
    working, buffers = budget.working(-(-kv // max(1, sizes.row_bytes)), parallel)
    need = MemoryNeed(
        weight_bytes=sizes.weight_bytes,
        kv_bytes=kv,
        prefix_cache_bytes=budget.prefix_cache(kv, working, parallel),
        working_bytes=working,
        process_bytes=sizes.process_bytes + sizes.tokenizer.held_bytes,
        load_transient_bytes=0,
        has_default_prefix_cache=spec.prefix_cache_bytes is None,
    )
    return Plan(
        dtype=spec.dtype,
        probe=sizes.probe,
        max_context_length=max_context_length,
        context_length=sizes.context_length,
        parallel=parallel,
        need=replace(need, load_transient_bytes=_transient(sizes, need)),
        kv_budget_bytes=kv,
        buffer_cache_bytes=buffers,
        token_bytes=sizes.token_bytes,
        pair_bytes=sizes.pair_bytes,
        logits_bytes=sizes.logits_bytes,
        row_bytes=decode_bytes(parallel) / parallel,
        warnings=warnings,
    )


def _transient(sizes: ModelSizes, need: MemoryNeed) -> int:
    """Return the memory for reading the files, beyond all that the model takes later."""
    held_later = need.kv_bytes + need.prefix_cache_bytes + need.working_bytes
    tokenizer = sizes.tokenizer
    return max(
        0,
        sizes.load_transient_bytes - held_later,
        # The tokenizer is read before the weights.
        tokenizer.peak_bytes - tokenizer.held_bytes - held_later - need.weight_bytes,
    )


@dataclass(frozen=True)
class _Budget:
    """The division of a load's memory, in bytes; some parts are functions of the sequences."""

    spec: LoadSpec
    sizes: ModelSizes
    transit_tokens: int = 0
    draft_bytes: int = 0

    def working(self, rows: int, parallel: int) -> tuple[int, int]:
        """Return the working memory, and the part for freed buffers kept by MLX.

        Args:
            rows: Number of full-length sequences within the KV budget.
            parallel: Most sequences decoded together, which may be shorter.
        """
        sizes = self.sizes
        copied = rows * sizes.probe.largest_layer_bytes(sizes.context_length)
        if parallel > 1:
            # A preempted row is copied out of the batch, where another one takes as much memory.
            copied = max(copied, min(rows * sizes.row_bytes // 2, sizes.row_bytes))
        step = sizes.decode_bytes(parallel)
        arrays = int(_WORKING_SLACK * max(self._prefill_bytes(parallel), step, copied))
        arrays += 2 * _MIB + sizes.probe.step_bytes + sizes.mask_bytes
        least, most = _BUFFER_CACHE_BYTES[sizes.device]
        buffers = min(most, max(least, arrays))
        return arrays + buffers, buffers

    def rows_that_fit(self) -> int:
        """Return the number of full-length sequences within the limit, at most ``parallel``."""
        if self.spec.memory_limit_bytes is not None and not self._fits(1, 1):
            raise self._too_large()
        return self._most(1, self.spec.parallel, lambda rows: self._fits(rows, rows))

    def parallel_that_fits(self, rows: int) -> int:
        """Return the most sequences decoded together, beside the caches of ``rows`` full ones.

        Short sequences take little of the KV budget, but each as much of a decode step.
        """
        shortest = max(1, self.sizes.probe.kv_bytes(1))
        seated = max(rows, ((rows + 1) * self.sizes.row_bytes - 1) // shortest)
        most = min(self.spec.parallel, seated)
        return self._most(rows, most, lambda parallel: self._fits(rows, parallel))

    def kv(self, rows: int, parallel: int) -> int:
        """Return the KV budget: ``rows`` full-length sequences, and part of another if it fits."""
        row = self.sizes.row_bytes
        if rows == parallel:
            return rows * row
        return max(rows * row, self._room - self.working(rows + 1, parallel)[0])

    def prefix_cache(self, kv: int, working: int, parallel: int) -> int:
        """Return the byte budget of the prefix cache."""
        if self.spec.prefix_cache_bytes is not None:
            return self.spec.prefix_cache_bytes
        row = self.sizes.row_bytes
        usual = max(row, row * parallel // _PREFIX_SHARE)
        if self.transit_tokens:
            usual += self.sizes.probe.kv_bytes(self.transit_tokens)
        if self.spec.memory_limit_bytes is None:
            return usual
        return max(0, min(usual, self._room - working - kv))

    def _most(self, low: int, high: int, fits: Callable[[int], bool]) -> int:
        """Return the largest number that fits, at least ``low``; ``high`` without a limit."""
        if self.spec.memory_limit_bytes is None or fits(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _fits(self, rows: int, parallel: int) -> bool:
        return rows * self.sizes.row_bytes + self.working(rows, parallel)[0] <= self._room

    def _prefill_bytes(self, parallel: int) -> int:
        """Working memory of prefill, of several prompts together if memory permits."""
        alone, together = self.sizes.prefill_bytes, self.sizes.together_bytes
        if parallel > 1:
            # See `BatchBudget`.
            alone = max(alone, min(together, _TOGETHER_BYTES + self.sizes.weight_bytes // 32))
        return alone

    @property
    def _room(self) -> int:
        limit = self.spec.memory_limit_bytes or 0
        kept = (self.spec.prefix_cache_bytes or 0) + self.draft_bytes
        return limit - self.sizes.weight_bytes - kept

    def _too_large(self) -> InsufficientMemory:
        limit, kept = self.spec.memory_limit_bytes or 0, self.spec.prefix_cache_bytes or 0
        weights, row, working = self.sizes.weight_bytes, self.sizes.row_bytes, self.working(1, 1)[0]
        need = weights + row + working + kept + self.draft_bytes
        parts = (
            f"{format_bytes(weights)} weights, {format_bytes(row)} KV cache "
            f"for {self.sizes.context_length} tokens, {format_bytes(working)} working memory"
        )
        if kept:
            parts += f", {format_bytes(kept)} prefix cache"
        if self.draft_bytes:
            parts += f", {format_bytes(self.draft_bytes)} draft model"
        return InsufficientMemory(
            f"the model needs {format_bytes(need)} ({parts}) and memory_limit_bytes is "
            f"{format_bytes(limit)}; raise it, or load with a smaller context_length, dtype or "
            "prefix_cache_bytes",
            requiredBytes=need,
            availableBytes=limit,
        )
