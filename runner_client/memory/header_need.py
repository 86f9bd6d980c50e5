"""Memory need of a model, computed from the headers of the files.

For machines without the server's packages, and for backends other than the installed one. The
server's own plan (:mod:`runner_common.memory.need_query`) is exact where this module can only
guess: recurrent states, windows and latent caches of many architectures, the arrays of a step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from runner_client.errors import InvalidRequestError
from runner_client.memory.header_kv import kv_layers
from runner_client.memory.header_weights import hosted_tensors, weigh
from runner_client.memory.model import read_adapter_files, read_model
from runner_common.contract import DEFAULT_CONTEXT_LENGTH
from runner_common.memory.need import MemoryNeed
from runner_common.memory.need_query import NeedAnswer, NeedRequest

WORKING_SHARE = 0.05
WORKING_MINIMUM_BYTES = 64 * 1024**2
"""Working memory of a step: a twentieth of weights and caches, but at least this much."""

PROCESS_BYTES = 160 * 1024**2
"""Interpreter and libraries, including transformers, which a tokenizer may need."""

PREFIX_SHARE = 4
"""The default prefix cache holds one sequence, or 1 / ``PREFIX_SHARE`` of all if that is more."""

_LEAST_GROUP = 32
"""Numbers that share a scale and a bias; 64 where the size of a head allows it."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def need_from_headers(request: NeedRequest) -> tuple[NeedAnswer, tuple[str, ...]]:
    """Add the need of a draft model, and notes on parts of unknown size.

    Raises:
        ModelUnsupportedError: The files are incomplete or damaged.
        InvalidRequestError: The context is longer than the model supports.
    """
    answer, notes = _need_alone(request)
    if not request.draft_path:
        return answer, notes
    longest = read_model(Path(request.draft_path)).configuration.context_length
    draft, more = _need_alone(
        NeedRequest(
            request.draft_path,
            context_length=min(answer.context_length, longest),
            parallel=1,
            dtype=request.dtype,
        )
    )
    need = answer.need.with_draft(draft.need)
    return replace(answer, need=need), (*notes, *(f"draft model: {note}" for note in more))


def _need_alone(request: NeedRequest) -> tuple[NeedAnswer, tuple[str, ...]]:
    directory = read_model(Path(request.path))
    config, longest = directory.configuration.values, directory.configuration.context_length
    tensors = hosted_tensors({name: s.tensor for name, s in directory.tensors.items()})
    context = _context_length(request.context_length, longest)
    weights = weigh(tensors, config, _ITEM_BYTES.get(request.dtype))
    layers = kv_layers(config, tensors)
    item_bytes = _ITEM_BYTES.get(request.dtype, weights.stored_item_bytes)
    # The server does not quantize sliding windows.
    quantized_bytes = _quantized_bytes(request.kv_bits, item_bytes)
    one = math.ceil(
        sum(
            layer.elements(context) * (quantized_bytes if layer.window is None else item_bytes)
            for layer in layers
        )
    )
    kept = request.prefix_cache_bytes
    held = weights.held_bytes + _adapter_bytes(request)
    need = MemoryNeed(
        weight_bytes=held,
        kv_bytes=one * request.parallel,
        prefix_cache_bytes=max(one, one * request.parallel // PREFIX_SHARE)
        if kept is None
        else kept,
        working_bytes=_working_bytes(held + one * request.parallel),
        process_bytes=PROCESS_BYTES,
        load_transient_bytes=weights.transient_bytes,
        has_default_prefix_cache=kept is None,
    )
    unknown = () if layers else ("KV cache not counted: config.json does not specify its size",)
    answer = NeedAnswer(need, request.dtype, context, longest, request.parallel)
    return answer, (*unknown, *directory.notes)


def _quantized_bytes(bits: int, item_bytes: float) -> float:
    """Return the bytes of a number in a quantized cache, scale and bias included."""
    return bits / 8 + 2 * item_bytes / _LEAST_GROUP if bits else item_bytes


def _adapter_bytes(request: NeedRequest) -> int:
    """Return the bytes of the adapters as float32, the format of mlx_lm."""
    found = [read_adapter_files(Path(path)) for _, path in request.adapters]
    return sum(4 * tensor.size for adapter in found for tensor in adapter.tensors.values())


def _working_bytes(held_bytes: int) -> int:
    return max(WORKING_MINIMUM_BYTES, int(held_bytes * WORKING_SHARE))


def _context_length(asked: int | None, longest: int) -> int:
    if asked is None:
        return min(longest, DEFAULT_CONTEXT_LENGTH)
    if asked > longest:
        text = f"{asked:,} is not in the range 2 to {longest:,}"
        raise InvalidRequestError(
            f"context_length: {text}", field_violations=[("context_length", text)]
        )
    return asked
