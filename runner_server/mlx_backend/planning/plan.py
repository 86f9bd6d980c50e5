"""What a load decides before it reads any weights: limits, and the memory they need.

The one formula for what a model takes: a load admits and limits by it, and the estimates of
the client and of the ``Estimate`` rpc are its result (:mod:`runner_server.mlx_backend.estimating`).
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from runner_common.memory.need import MemoryNeed
from runner_common.model_directory import DEFAULT_CONTEXT, ModelDirectory
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
"""Most tokens of a prompt that are evaluated at once: it bounds the memory that takes."""

ROWS_TOGETHER = 4
"""Chunks of prompts that may be evaluated as one, where their memory allows."""

_BUFFER_CACHE_BYTES = {"cpu": (4 * _MIB, 32 * _MIB), "gpu": (64 * _MIB, 1024 * _MIB)}
"""Least and most that MLX keeps of freed buffers. On a CPU 32 MiB is MLX's own limit; more only
grew the process in a soak, because the C heap reuses pieces of other sizes and MLX does not."""

_PREFIX_SHARE = 4
"""The default prefix cache holds one sequence, or one part in so many of all sequences."""

_READ_TOGETHER_BYTES = 64 * _MIB
"""Sources that are there at once: of 32 MiB of weights, and up to twice as large."""

_TOGETHER_BYTES = 64 * _MIB
"""Memory that prompts may take to be evaluated together, and a 32nd of the weights on top."""

_WORKING_SLACK = 1.15
"""Measured peaks of MLX were up to 1.17 times the traced figure with ``set_memory_limit`` at it."""

_PROCESS_BYTES = 94 * _MIB
"""Of a server with a tiny model: Python, gRPC, MLX and their heaps. 70 to 80 MiB for most types,
15 more where MLX compiles kernels that are not in its cache yet."""

_STREAM_BYTES = _MIB // 4
"""Of the process, for each sequence: messages, token lists, thread stacks."""

_IMPORTED_BYTES = {"transformers": 75 * _MIB, "numpy": 20 * _MIB}
"""Memory of packages that only some models need: transformers for a tokenizer (it imports NumPy
itself), NumPy 2.4 (16 MiB) for mlx_lm's modules of plamo, dbrx and gpt_bigcode."""


@dataclass(frozen=True)
class Plan:
    """What a load has decided before it reads any weights; see ``ModelInfo``.

    Attributes:
        dtype: The format of the weights; never AUTO.
        probe: The shapes of the model's caches.
        need: The memory that it all takes.
        kv_budget_bytes: The most for the KV caches of all running completions.
        buffer_cache_bytes: The most that MLX keeps of freed buffers.
        token_bytes: What each token of a chunk takes while it is evaluated.
        pair_bytes: The same for each pair of it and a token that it sees.
        parallel: Completions decoded together; 1 where the model does not take more.
        warnings: Where the model's answers may differ from what its files say.
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
        """What evaluating so many tokens of a prompt after so many others takes."""
        return tokens * (self.token_bytes + self.pair_bytes * (before + tokens))

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of KV cache for one sequence."""
        return self.probe.kv_bytes(tokens)

    @property
    def limit_bytes(self) -> int:
        """The most that MLX may hold."""
        return self.need.mlx_bytes

    @property
    def share(self) -> float:
        """For how many sequences of the whole context there is memory."""
        return self.kv_budget_bytes / max(1, self.kv_bytes(self.context_length))

    def with_share(self, share: float) -> Plan:
        """The same with memory for so many sequences, which may be fewer."""
        budget = min(self.kv_budget_bytes, int(share * self.kv_bytes(self.context_length)))
        return replace(self, kv_budget_bytes=budget)

    def within(self, granted_bytes: int) -> Plan:
        """The same with a default prefix cache that is no larger than there is memory for."""
        if not self.need.has_default_prefix_cache:
            return self
        rest = max(0, granted_bytes - self.need.required_bytes)
        kept = min(self.need.prefix_cache_bytes, rest)
        return replace(self, need=replace(self.need, prefix_cache_bytes=kept))

    def settled(self, spec: LoadSpec) -> LoadSpec:
        """The same load with nothing left to choose."""
        return replace(
            spec,
            dtype=self.dtype,
            parallel=self.parallel,
            context_length=self.context_length,
            prefix_cache_bytes=self.need.prefix_cache_bytes,
        )


def formats(dtype: Dtype) -> tuple[Dtype, ...]:
    """The formats of weights to try, in order."""
    automatic = Dtype.FLOAT32 if device_kind() == "cpu" else Dtype.AS_STORED
    if dtype is Dtype.AUTO:
        return (automatic,)
    if dtype is Dtype.AUTO_OR_STORED:
        return tuple(dict.fromkeys((automatic, Dtype.AS_STORED)))
    return (dtype,)


def make_plan(
    spec: LoadSpec, model: Module, directory: ModelDirectory, exactness: Exactness
) -> Plan:
    """Decide limits, and add up the memory that they take.

    Args:
        spec: What to load, in one of :func:`formats`.
        model: With lazy weights, already in that format.
        directory: Its files.
        exactness: How far it can be computed as they say.

    Raises:
        InvalidField: The context is longer than the model can handle, or than is exact.
        InsufficientMemory: ``memory_limit_bytes`` is too small for one sequence.
        ModelUnsupported: It cannot be run.
    """
    try:
        return _plan(spec, model, directory, exactness)
    except RowsApartError as why:
        warning = alone_warning(directory.configuration.model_type, str(why))
    plan = _plan(replace(spec, parallel=1), model, directory, exactness)
    return replace(plan, warnings=(*plan.warnings, warning))


def alone_warning(model_type: str, why: str) -> str:
    """Return what is said of a model whose completions run one after another."""
    return (
        f"completions run one after another, whatever `parallel` says: mlx_lm does not decode "
        f"several sequences of a {model_type!r} model together rightly ({why})"
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
        # It is read before the weights.
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


def context_in_force(spec: LoadSpec, longest: int, exactness: Exactness) -> int:
    """Return the longest sequence of a load, in tokens.

    Args:
        spec: The load.
        longest: What the model was made for.
        exactness: Up to where it is computed as its files say; the default stays within.

    Raises:
        InvalidField: The load asks for more than either, and does not allow that.
    """
    exact = exactness.length or longest
    if spec.context_length is None:
        return min(longest, exact, DEFAULT_CONTEXT)
    if spec.context_length > longest:
        text = f"{spec.context_length} is more than the {longest} tokens this model can handle"
        raise InvalidField([("context_length", text)])
    if spec.context_length > exact and not spec.allow_inexact:
        causes = "; ".join(each.text for each in exactness.differences)
        text = (
            f"{spec.context_length} is more than the {exact} tokens up to which this model is "
            f"computed as its files say ({causes}); ask for at most that, or allow_inexact"
        )
        raise InvalidField([("context_length", text)])
    return spec.context_length


class _Sizes:
    """The memory of one model for a number of sequences."""

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
            # Prompts share a call as far as there is room; see `BatchBudget`.
            alone = max(alone, min(together, _TOGETHER_BYTES + self.weight_bytes // 32))
        self._prefill_bytes = alone

    def working(self, rows: int) -> tuple[int, int]:
        """Return the working memory, and how much of it are buffers kept for reuse."""
        copied = rows * self._probe.largest_layer_bytes(self._context)
        if rows > 1:
            # A row that is set aside is copied out of the batch.
            copied = max(copied, self._row_bytes)
        step = decode_bytes(self._model, rows, self._context)
        arrays = int(_WORKING_SLACK * max(self._prefill_bytes, step, copied))
        arrays += 2 * _MIB + self._probe.step_bytes
        least, most = _BUFFER_CACHE_BYTES[device_kind()]
        buffers = min(most, max(least, arrays))
        return arrays + buffers, buffers

    def rows_that_fit(self) -> int:
        """Return for how many sequences the limit has room: all, where there is none."""
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
        """Return the memory for KV caches: of all sequences, or as much as the limit allows."""
        full = self._row_bytes * self._spec.parallel
        budget = full if self._spec.memory_limit_bytes is None else self._room - working
        return max(self._row_bytes * rows, min(full, budget))

    def prefix_cache(self, kv: int, working: int) -> int:
        """Return the most for evaluated prompts."""
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
    """Return what the process itself takes: interpreter, libraries, heap.

    Call it when the model is built and the tokenizer read, with the packages that they import.
    """
    imported = (size for name, size in _IMPORTED_BYTES.items() if name in sys.modules)
    return _PROCESS_BYTES + parallel * _STREAM_BYTES + max(imported, default=0)


def load_transient_bytes(model: Module, directory: ModelDirectory) -> int:
    """Return what reading the files takes beyond the weights that stay.

    Weights are converted from sources that go when their copies are there: those of 32 MiB of
    weights at the same time, or of one that is larger. A narrow source exists once more in 16
    bits before it is widened, and a wide one is twice as large as its copy. A weight that has
    shape and format of a stored tensor is that tensor.
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
    """Return the bytes of a model's weights in their present format."""
    return sum(value.nbytes for value in arrays(model))


def arrays(model: Module) -> list[mx.array]:
    """Return all weights of a model."""
    named = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return [value for _, value in named]


def device_kind() -> str:
    """Return ``"gpu"`` or ``"cpu"``, where MLX computes by default."""
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
