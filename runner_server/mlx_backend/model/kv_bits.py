"""Quantization of a model's keys and values, and the attention to them.

mlx_lm's models hand what their cache returns to ``scaled_dot_product_attention``, which calls a
function of its own for quantized keys. A type that computes its attention itself, or reads keys,
raises with quantized ones, and is refused before its weights are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.errors import InvalidField
from runner_server.mlx_backend.cache.quantized import GROUP_SIZES, Parts, QuantizedCache
from runner_server.mlx_backend.upstream.names import (
    KVCache,
    make_prompt_cache,
    use_quantized_attention,
)

_MANY_QUERIES = 4
"""Queries from which keys are dequantized once rather than in each product.

Measured on an AMD EPYC with OpenBLAS: one query of 8 heads over 4,096 tokens takes 4 to 7 ms with
quantized products and 6 to 11 with dequantized keys, 128 queries take 320 to 580 ms and 74."""

_MAX_CAUSE_CHARS = 80

_TRIED_TOKENS = (1, 2 * _MANY_QUERIES)


def quantize_caches(model: Module, bits: int, model_type: str) -> None:
    """Make a model create caches with quantized keys and values.

    Layers with a key and a value for every token are quantized. Sliding windows and recurrent
    states stay as they are, as their size does not grow with the text.

    Args:
        model: A model with lazy weights.
        bits: 4 or 8.
        model_type: Its type, for the message.

    Raises:
        InvalidField: The model has no such layers, or they cannot be quantized.
    """
    new_caches = _creator(model)
    try:
        kinds = _kinds(model, new_caches(), bits)
    except ValueError as error:
        raise refusal(model_type, str(error)) from error
    use_quantized_attention(attention)
    # The name that mlx_lm looks up before it creates caches of its own.
    cast("Any", model).make_cache = lambda: [
        kind() if kind else cache for kind, cache in zip(kinds, new_caches(), strict=True)
    ]
    try:
        caches = make_prompt_cache(model)
        for count in _TRIED_TOKENS:
            model(mx.zeros((1, count), dtype=mx.int32), cache=caches)
    except Exception as error:
        # Most errors are those of a list where an array was expected, which say no more.
        cause = str(error) if isinstance(error, ValueError) else type(error).__name__
        why = f"its attention does not take quantized keys ({cause[:_MAX_CAUSE_CHARS]})"
        raise refusal(model_type, why) from error


def refusal(model_type: str, why: str) -> InvalidField:
    """Return the error for a model whose keys and values cannot be quantized."""
    text = f"the keys and values of a {model_type!r} model cannot be quantized: {why}"
    return InvalidField([("kv_bits", text)])


def _creator(model: Module) -> Callable[[], list[Any]]:
    if hasattr(model, "make_cache"):
        return cast("Callable[[], list[Any]]", cast("Any", model).make_cache)
    count = len(make_prompt_cache(model))
    return lambda: [KVCache() for _ in range(count)]


def _kinds(
    model: Module, caches: list[Any], bits: int
) -> list[Callable[[], QuantizedCache] | None]:
    """Return what creates each layer's quantized cache; None for a layer that stays as it is.

    Raises:
        ValueError: No layer can be quantized, or the size of a head does not allow it.
    """
    if all(type(cache) is not KVCache for cache in caches):
        names = ", ".join(sorted({type(cache).__name__ for cache in caches}))
        raise ValueError(f"its caches are of kind {names}")
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    return [_kind(cache, bits) if type(cache) is KVCache else None for cache in caches]


def _kind(cache: Any, bits: int) -> Callable[[], QuantizedCache]:
    # A layer without attention leaves its cache empty.
    sizes = [] if cache.keys is None else [cache.keys.shape[3], cache.values.shape[3]]
    group = next((g for g in GROUP_SIZES if all(s and s % g == 0 for s in sizes)), None)
    if group is None:
        heads = " and ".join(map(str, sorted(set(sizes))))
        raise ValueError(f"its heads have {heads} numbers, which is not a multiple of 32")
    return lambda: QuantizedCache(group, bits)


def attention(
    queries: mx.array,
    q_keys: Parts,
    q_values: Parts,
    scale: float,
    mask: mx.array | str | None,
    group_size: int,
    bits: int,
) -> mx.array:
    """Compute the attention of queries to quantized keys and values.

    In place of mlx_lm's function, which multiplies the caller's queries in place, though some
    models use them again, and which is slow for many queries on a CPU.

    Args:
        queries: Shape (rows, heads, queries, head size).
        q_keys: Codes, scales and biases of shape (rows, KV heads, tokens, ...).
        q_values: As ``q_keys``.
        scale: Factor of the scores.
        mask: As for ``mx.fast.scaled_dot_product_attention``.
        group_size: Numbers that share a scale and a bias.
        bits: Bits of a number.
    """
    if queries.shape[2] >= _MANY_QUERIES:
        keys, values = (
            mx.dequantize(codes, scales, biases, group_size, bits)
            for codes, scales, biases in (q_keys, q_values)
        )
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    rows, heads, count, _ = queries.shape
    kv_heads = q_keys[0].shape[1]
    grouped = (queries * scale).reshape(rows, kv_heads, heads // kv_heads, count, -1)
    scores = _product(grouped, q_keys, group_size, bits, transpose=True)
    scores = mx.softmax(_masked(scores, mask), axis=-1, precise=True)
    found = _product(scores, q_values, group_size, bits, transpose=False)
    return found.reshape(rows, heads, count, -1)


def _product(
    left: mx.array, parts: Parts, group_size: int, bits: int, *, transpose: bool
) -> mx.array:
    if mx.default_device() == mx.Device(mx.cpu):
        # MLX makes such a copy there anyway, where the estimate would not see it.
        parts = tuple(map(mx.contiguous, parts))
    codes, scales, biases = (part[:, :, None] for part in parts)
    return mx.quantized_matmul(left, codes, scales, biases, transpose, group_size, bits)


def _masked(scores: mx.array, mask: mx.array | str | None) -> mx.array:
    if mask is None:
        return scores
    if isinstance(mask, str):
        count, tokens = scores.shape[-2:]
        mask = mx.arange(tokens - count, tokens)[:, None] >= mx.arange(tokens)
    if mask.ndim > 2:
        # The heads of a mask, of which there may be one, are those of the groups of queries.
        heads = mask.shape[-3]
        groups = (1, 1) if heads == 1 else scores.shape[1:3]
        mask = mask.reshape(*mask.shape[:-3], *groups, *mask.shape[-2:])
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return scores + mask
