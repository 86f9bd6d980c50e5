"""What a model needs in memory, part by part, read from its files without loading it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mlxrunner.hostmemory import Backend, installed_backend
from runner_client._kv import kv_layers, text_config
from runner_client._safetensors import read_config, read_tensors, resolve_model
from runner_client._weights import hosted_tensors, weigh
from runner_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

DType = Literal["auto", "float32", "bfloat16", "float16", "as_stored"]

DEFAULT_CONTEXT_LENGTH = 4096
"""What a runner uses when none is asked for, or the model's own length if that is less."""

DEFAULT_PARALLEL = 4
"""How many completions a runner decodes together when it is not told."""

MARGIN_SHARE = 0.05
MARGIN_MINIMUM_BYTES = 64 * 1024**2

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a model needs, every part visible.

    Attributes:
        model: The model as asked for.
        path: Its directory.
        backend: ``"cpu"``, ``"metal"`` or ``"cuda"``.
        dtype: What the weights are converted to, or ``"as_stored"``.
        context_length: Tokens of one sequence that were assumed.
        model_context_length: What the model was made for; None if it does not say.
        parallel: Sequences held at once.
        file_bytes: The tensors as stored. No part of the need: a comparison.
        weight_bytes: The weights as held after the load.
        kv_bytes: The KV caches of ``parallel`` sequences of ``context_length`` tokens.
        load_transient_bytes: Sources that are there beside their converted copies.
        margin_bytes: 5 % of weights and KV, at least 64 MiB: activations of a
            prefill chunk, buffers MLX keeps for reuse, the copy a growing cache
            makes, rounding.
        notes: What could not be told from the files, in words.
        prefix_cache_bytes: What was asked for to keep evaluated prompts in. 0 where
            nothing was: a runner's own choice is a share of what is left over.
    """

    model: str
    path: str
    backend: Backend
    dtype: DType
    context_length: int
    model_context_length: int | None
    parallel: int
    file_bytes: int
    weight_bytes: int
    kv_bytes: int
    load_transient_bytes: int
    margin_bytes: int
    notes: tuple[str, ...] = ()
    prefix_cache_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The need: the sum of its parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the need by name, in bytes; a prefix cache only if one was asked for."""
        asked = {"prefix cache": self.prefix_cache_bytes} if self.prefix_cache_bytes else {}
        return {
            "weights": self.weight_bytes,
            "KV cache": self.kv_bytes,
            **asked,
            "load transient": self.load_transient_bytes,
            "margin": self.margin_bytes,
        }


def estimate(
    model: str,
    *,
    context_length: int | None = None,
    parallel: int = DEFAULT_PARALLEL,
    dtype: DType = "auto",
    backend: Backend | None = None,
    prefix_cache_bytes: int | None = None,
) -> MemoryEstimate:
    """Estimates the memory of a runner that hosts the model.

    ``dtype="auto"`` is float32 on the CPU, where it is the only fast type and packed
    weights are expanded to it, and ``"as_stored"`` elsewhere. Keys and values
    have the type of the weights. Not measured on Metal or CUDA.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        context_length: Tokens of one sequence; by default what a runner uses:
            the model's own length, at most 4,096.
        parallel: Sequences held at once; by default as many as a runner takes.
        dtype: What the weights are converted to.
        backend: Where the model runs; by default what the installed MLX uses.
        prefix_cache_bytes: The most to keep evaluated prompts in. None adds nothing: a
            runner then takes no more than is left over.

    Raises:
        ModelNotFoundError: There is no such model on this machine.
        ModelUnsupportedError: Its files are incomplete or damaged.
        InvalidRequestError: ``context_length`` is less than 2 or more than the model can
            handle, ``parallel`` is not 1 to 256, or ``prefix_cache_bytes`` is negative or
            no 64-bit number.
    """
    _require("context_length", context_length, 2, 2**31 - 1)
    _require("parallel", parallel, 1, 256)
    _require("prefix_cache_bytes", prefix_cache_bytes, 0, 2**63 - 1)
    path = resolve_model(model)
    backend = backend or installed_backend()
    need = _estimate(model, path, context_length, parallel, _resolved(dtype, backend), backend)
    return replace(need, prefix_cache_bytes=prefix_cache_bytes or 0)


def _require(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        text = f"{value:,} is not in the range {low:,} to {high:,}"
        raise InvalidRequestError(f"{name}: {text}", field_violations=[(name, text)])


def _estimate(
    model: str,
    path: Path,
    context_length: int | None,
    parallel: int,
    dtype: DType,
    backend: Backend,
) -> MemoryEstimate:
    config, stored = read_config(path), read_tensors(path)
    tensors = hosted_tensors(stored)
    longest = _model_context_length(config)
    if longest is not None:
        _require("context_length", context_length, 2, longest)
    context_length = context_length or min(
        longest or DEFAULT_CONTEXT_LENGTH, DEFAULT_CONTEXT_LENGTH
    )
    weights = weigh(tensors, config, _ITEM_BYTES.get(dtype))
    layers = kv_layers(config, tensors)
    item_bytes = _ITEM_BYTES.get(dtype, weights.stored_item_bytes)
    kv_bytes = parallel * item_bytes * sum(layer.elements(context_length) for layer in layers)
    return MemoryEstimate(
        model=model,
        path=str(path),
        backend=backend,
        dtype=dtype,
        context_length=context_length,
        model_context_length=longest,
        parallel=parallel,
        file_bytes=sum(tensor.nbytes for tensor in stored.values()),
        weight_bytes=weights.held_bytes,
        kv_bytes=kv_bytes,
        load_transient_bytes=weights.transient_bytes,
        margin_bytes=_margin_bytes(weights.held_bytes + kv_bytes),
        notes=() if layers else ("KV cache not counted: config.json does not tell its size",),
    )


def _resolved(dtype: DType, backend: Backend) -> DType:
    if dtype != "auto":
        return dtype
    return "float32" if backend == "cpu" else "as_stored"


def _margin_bytes(held_bytes: int) -> int:
    return max(MARGIN_MINIMUM_BYTES, int(held_bytes * MARGIN_SHARE))


def _model_context_length(config: Mapping[str, Any]) -> int | None:
    text = text_config(config)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = text.get(name)
        if type(value) is int and value > 0:
            return value
    return None
