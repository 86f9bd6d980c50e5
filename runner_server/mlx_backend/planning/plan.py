"""Plan of a load: limits and memory need, decided before any weights are read.

This is the only formula for a model's memory. Loads use it for admission and limits, and the
estimates of the client and of the ``Estimate`` rpc use it through
:mod:`runner_server.mlx_backend.estimating`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from runner_common.contract import DEFAULT_CONTEXT_LENGTH
from runner_common.memory.need import MemoryNeed
from runner_common.model_directory import ModelDirectory
from runner_common.units import format_bytes
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import InsufficientMemory, InvalidField
from runner_server.mlx_backend.model.casting import casting_notes
from runner_server.mlx_backend.model.exactness import Exactness
from runner_server.mlx_backend.planning.kv_memory import Probe, probe
from runner_server.mlx_backend.planning.tokenizer_memory import tokenizer_memory
from runner_server.mlx_backend.planning.working_memory import (
    RowsApartError,
    batch_prefill_bytes,
    decode_bytes,
    prefill_bytes,
    require_batches,
)

_MIB = 1 << 20

PREFILL_CHUNK = {"cpu": 128, "gpu": 1024}
"""Most prompt tokens in one prefill chunk, which bounds the memory of the chunk."""

ROWS_TOGETHER = 4
"""Most prefill chunks computed in one call, if memory permits."""

_BUFFER_CACHE_BYTES = {"cpu": (4 * _MIB, 32 * _MIB), "gpu": (64 * _MIB, 1024 * _MIB)}
"""Minimum and maximum of the freed buffers that MLX keeps for reuse. In a soak test on a CPU, more
than 32 MiB only let the process grow, because the C heap reuses blocks for other sizes and MLX does
not. 32 MiB is also MLX's own limit there."""

_PREFIX_SHARE = 4
"""The default prefix cache holds one sequence, or a quarter of the memory of all sequences."""

_READ_TOGETHER_BYTES = 64 * _MIB
"""Most bytes of source tensors alive at once: those of 32 MiB of weights, up to twice as wide."""

_TOGETHER_BYTES = 64 * _MIB
"""Memory for prefilling several prompts in one call; a 32nd of the weights is added."""

_WORKING_SLACK = 1.15
"""Factor on traced bytes. MLX's measured peaks were up to 1.17 times the traced bytes with
``set_memory_limit`` at that size."""

_PROCESS_BYTES = 96 * _MIB
"""Memory of a server with a tiny model: Python, gRPC, MLX and their heaps. 70 to 80 MiB for most
types, 15 more if MLX compiles kernels that are not cached yet."""

_STREAM_BYTES = _MIB // 4
"""Process memory per sequence: messages, token lists, thread stacks."""

_IMPORTED_BYTES = {"transformers": 75 * _MIB, "numpy": 12 * _MIB}
"""Memory of packages that only some models need: transformers for a tokenizer (it imports NumPy
too), NumPy for mlx_lm's modules of plamo, dbrx and gpt_bigcode. NumPy 2.4 takes 16 MiB, which
``_PROCESS_BYTES`` partly covers."""


@dataclass(frozen=True)
class Plan:
    """The decisions of a load before reading weights; see ``ModelInfo``.

    Attributes:
        dtype: The dtype of the weights; never AUTO.
        probe: The shapes of the model's caches.
        max_context_length: The longest sequence that the model supports, in tokens.
        context_length: The longest sequence of this load, in tokens.
        parallel: Most requests decoded together; 1 if the model does not support batches.
        need: The memory needed, part by part.
        kv_budget_bytes: Most bytes for the KV caches of all running requests.
        buffer_cache_bytes: Most bytes of freed buffers that MLX keeps for reuse.
        token_bytes: Bytes of working memory per token of a prefill chunk.
        pair_bytes: Bytes of working memory per pair of a token and a token that it attends to.
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
    warnings: tuple[str, ...] = ()

    def chunk_bytes(self, tokens: int, before: int) -> float:
        """Return the bytes of working memory to prefill ``tokens`` after ``before`` others."""
        return tokens * (self.token_bytes + self.pair_bytes * (before + tokens))

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

    def settled(self, spec: LoadSpec) -> LoadSpec:
        """Return the load with this plan's decisions in place of every automatic choice."""
        return replace(
            spec,
            dtype=self.dtype,
            parallel=self.parallel,
            context_length=self.context_length,
            prefix_cache_bytes=self.need.prefix_cache_bytes,
        )


def formats(dtype: Dtype) -> tuple[Dtype, ...]:
    """Return the dtypes to try for a requested one, in order."""
    automatic = Dtype.FLOAT32 if device_kind() == "cpu" else Dtype.AS_STORED
    if dtype is Dtype.AUTO:
        return (automatic,)
    if dtype is Dtype.AUTO_OR_STORED:
        return tuple(dict.fromkeys((automatic, Dtype.AS_STORED)))
    return (dtype,)


def make_plan(
    spec: LoadSpec, model: Module, directory: ModelDirectory, exactness: Exactness
) -> Plan:
    """Plan a load, for one request at a time if the model does not support batches.

    Args:
        spec: The load, with one of the dtypes of :func:`formats`.
        model: A model with lazy weights, already cast to that dtype.
        directory: The model's files.
        exactness: The known differences between the model and its files.

    Raises:
        InvalidField: The context is longer than the model supports, or too long to be exact.
        InsufficientMemory: ``memory_limit_bytes`` is too small for one sequence.
        ModelUnsupported: The model cannot run.
    """
    try:
        return _plan(spec, model, directory, exactness)
    except RowsApartError as why:
        warning = alone_warning(directory.configuration.model_type, str(why))
    plan = _plan(replace(spec, parallel=1), model, directory, exactness)
    return replace(plan, warnings=(*plan.warnings, warning))


def alone_warning(model_type: str, why: str) -> str:
    """Return the warning for a model whose requests run one after another."""
    return (
        f"completions run one after another, whatever `parallel` says: mlx_lm does not decode "
        f"several sequences of a {model_type!r} model together correctly ({why})"
    )


def _plan(spec: LoadSpec, model: Module, directory: ModelDirectory, exactness: Exactness) -> Plan:
    longest = directory.configuration.context_length
    context = context_in_force(spec, longest, exactness)
    seen = probe(model, PREFILL_CHUNK[device_kind()])
    if spec.parallel > 1:
        require_batches(model)
    sizes = _Sizes(spec, context, model, seen)
    rows = sizes.rows_that_fit()
    working, buffers = sizes.working(rows)
    budget = sizes.kv(rows, working)
    tokenizer = tokenizer_memory(directory.path)
    need = MemoryNeed(
        weight_bytes=sizes.weight_bytes,
        kv_bytes=budget,
        prefix_cache_bytes=sizes.prefix_cache(budget, working),
        working_bytes=working,
        process_bytes=process_bytes(spec.parallel) + tokenizer.held_bytes,
        load_transient_bytes=0,
        has_default_prefix_cache=spec.prefix_cache_bytes is None,
    )
    held_later = need.kv_bytes + need.prefix_cache_bytes + need.working_bytes
    transient = max(
        0,
        load_transient_bytes(model, directory) - held_later,
        # The tokenizer is read before the weights.
        tokenizer.peak_bytes - tokenizer.held_bytes - held_later - need.weight_bytes,
    )
    need = replace(need, load_transient_bytes=transient)
    return Plan(
        dtype=spec.dtype,
        probe=seen,
        max_context_length=longest,
        context_length=context,
        parallel=spec.parallel,
        need=need,
        kv_budget_bytes=budget,
        buffer_cache_bytes=buffers,
        token_bytes=sizes.token_bytes,
        pair_bytes=sizes.pair_bytes,
        warnings=(*directory.notes, *exactness.warnings(context), *casting_notes(model)),
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


class _Sizes:
    """Sizes of one model's memory in bytes, some as functions of the number of sequences."""

    def __init__(self, spec: LoadSpec, context: int, model: Module, seen: Probe) -> None:
        self._spec = spec
        self._context = context
        self._model = model
        self._probe = seen
        self._row_bytes = seen.kv_bytes(context)
        self.weight_bytes = weight_bytes(model)
        chunk = min(PREFILL_CHUNK[device_kind()], context)
        alone = prefill_bytes(model, chunk, context)
        rows = min(ROWS_TOGETHER, spec.parallel)
        together = batch_prefill_bytes(model, rows, chunk)
        self.token_bytes = together / (rows * chunk)
        self.pair_bytes = max(0.0, alone / chunk - self.token_bytes) / context
        if spec.parallel > 1:
            # Prompts are prefilled together if memory permits; see `BatchBudget`.
            alone = max(alone, min(together, _TOGETHER_BYTES + self.weight_bytes // 32))
        self._prefill_bytes = alone

    def working(self, rows: int) -> tuple[int, int]:
        """Return the working memory, and the part for freed buffers kept by MLX."""
        copied = rows * self._probe.largest_layer_bytes(self._context)
        if rows > 1:
            # A preempted row is copied out of the batch.
            copied = max(copied, self._row_bytes)
        step = decode_bytes(self._model, rows, self._context)
        arrays = int(_WORKING_SLACK * max(self._prefill_bytes, step, copied))
        arrays += 2 * _MIB + self._probe.step_bytes
        least, most = _BUFFER_CACHE_BYTES[device_kind()]
        buffers = min(most, max(least, arrays))
        return arrays + buffers, buffers

    def rows_that_fit(self) -> int:
        """Return the number of sequences within the limit; ``parallel`` without a limit."""
        low, high = 1, self._spec.parallel
        if self._spec.memory_limit_bytes is None or self._fits(high):
            return high
        if not self._fits(1):
            raise self._too_large()
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle)
        return low

    def kv(self, rows: int, working: int) -> int:
        """Return the KV budget: room for ``parallel`` sequences, or as much as the limit allows."""
        full = self._row_bytes * self._spec.parallel
        budget = full if self._spec.memory_limit_bytes is None else self._room - working
        return max(self._row_bytes * rows, min(full, budget))

    def prefix_cache(self, kv: int, working: int) -> int:
        """Return the byte budget of the prefix cache."""
        if self._spec.prefix_cache_bytes is not None:
            return self._spec.prefix_cache_bytes
        usual = max(self._row_bytes, self._row_bytes * self._spec.parallel // _PREFIX_SHARE)
        if self._spec.memory_limit_bytes is None:
            return usual
        return max(0, min(usual, self._room - working - kv))

    def _fits(self, rows: int) -> bool:
        return rows * self._row_bytes + self.working(rows)[0] <= self._room

    @property
    def _room(self) -> int:
        limit = self._spec.memory_limit_bytes or 0
        return limit - self.weight_bytes - (self._spec.prefix_cache_bytes or 0)

    def _too_large(self) -> InsufficientMemory:
        limit, kept = self._spec.memory_limit_bytes or 0, self._spec.prefix_cache_bytes or 0
        working = self.working(1)[0]
        need = self.weight_bytes + self._row_bytes + working + kept
        parts = (
            f"{format_bytes(self.weight_bytes)} weights, {format_bytes(self._row_bytes)} KV cache "
            f"for {self._context} tokens, {format_bytes(working)} working memory"
        )
        if kept:
            parts += f", {format_bytes(kept)} prefix cache"
        return InsufficientMemory(
            f"the model needs {format_bytes(need)} ({parts}) and memory_limit_bytes is "
            f"{format_bytes(limit)}; raise it, or load with a smaller context_length, dtype or "
            "prefix_cache_bytes",
            requiredBytes=need,
            availableBytes=limit,
        )


def process_bytes(parallel: int) -> int:
    """Return the memory of the process itself: interpreter, libraries and heap, in bytes.

    Call after the model is built and its tokenizer read, because these import further packages.
    """
    imported = (size for name, size in _IMPORTED_BYTES.items() if name in sys.modules)
    return _PROCESS_BYTES + parallel * _STREAM_BYTES + max(imported, default=0)


def load_transient_bytes(model: Module, directory: ModelDirectory) -> int:
    """Return the peak bytes for reading weight files, in addition to the final weights.

    Weights are converted from source tensors, which are freed once the copies exist. The sources
    of 32 MiB of weights, or of a single larger one, are alive at the same time. A narrow source
    exists a second time, in 16 bits, before it is widened; a wide source is twice as large as its
    copy. A weight with the shape and size of a stored tensor is that tensor, and needs no copy.
    """
    tensors = [stored.tensor for stored in directory.tensors.values()]
    stored = Counter((tensor.shape, tensor.nbytes) for tensor in tensors)
    widest = max((tensor.nbytes // max(1, tensor.size) for tensor in tensors), default=0)
    sources = []
    for value in arrays(model):
        kind = (value.shape, value.nbytes)
        if stored[kind]:
            stored[kind] -= 1
        else:
            sources.append(value.nbytes * (2 if widest > value.dtype.size else 1))
    return max(max(sources, default=0), min(sum(sources), _READ_TOGETHER_BYTES))


def weight_bytes(model: Module) -> int:
    """Return the bytes of a model's weights in their current dtypes."""
    return sum(value.nbytes for value in arrays(model))


def arrays(model: Module) -> list[mx.array]:
    """Return the weights of a model."""
    named = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return [value for _, value in named]


def device_kind() -> str:
    """Return the kind of MLX's default device, ``"gpu"`` or ``"cpu"``."""
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
