"""Trial of a loaded model with quantized keys and values.

A type whose attention does not take them raises before its weights are read. This trial finds a
type that takes them and computes something else: it compares the logits with those of the same
model with plain caches of the same numbers, each quantized and dequantized before it is stored.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.mlx_backend.cache.quantized import QuantizedCache, quantized, split
from runner_server.mlx_backend.cache.row_caches import CachePieces, Caches
from runner_server.mlx_backend.loading.batch_trial import largest, tolerance
from runner_server.mlx_backend.upstream.names import KVCache

_PROMPT_TOKENS, _TOKENS = 12, 3

_TOLERANCE = 0.1
"""Tolerance in standard deviations. Rounding can move a number to the next of its 16 values. In
models of 95 types with random weights the difference was at most 2e-6, in float32 on a CPU."""


class RoundedCache(KVCache):  # type: ignore[misc]  # mlx_lm has no types
    """A plain cache of numbers that were quantized and dequantized.

    Args:
        group_size: Numbers that share a scale and a bias.
        bits: Bits of a number.
    """

    def __init__(self, group_size: int, bits: int) -> None:
        super().__init__()
        # Not `bits`, by which mlx_lm's attention would take the keys for quantized ones.
        self._form = group_size, bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append rounded keys and values; return all of them."""
        rounded = [
            mx.dequantize(codes, scales, biases, *self._form)
            for codes, scales, biases in split(quantized(keys, values, *self._form))
        ]
        return super().update_and_fetch(*rounded)


def rounded_caches(caches: Caches) -> Caches:
    """Return empty caches with plain keys and values, rounded, in place of quantized ones."""
    return [
        RoundedCache(cache.group_size, cache.bits) if isinstance(cache, QuantizedCache) else cache
        for cache in caches
    ]


def try_quantized(model: Module, pieces: CachePieces, vocab_size: int) -> str | None:
    """Return why a model computes something else with quantized keys; None if it does not.

    Args:
        model: The model, with weights read.
        pieces: Creates the model's caches.
        vocab_size: Number of token ids scored by the output layer.
    """
    found = deviation(model, pieces, vocab_size)
    if found <= max(_TOLERANCE, tolerance(model)):
        return None
    return (
        f"logits differ from those with the same numbers in plain caches by up to {found:.2g} "
        "standard deviations"
    )


def deviation(model: Module, pieces: CachePieces, vocab_size: int) -> float:
    """Return the largest difference of two logits, in standard deviations.

    A prompt is evaluated in one call, as attention to many queries differs from that to few, and
    then single tokens.
    """
    count = _PROMPT_TOKENS + _TOKENS
    ids = [(2 * index + 1) * vocab_size // (2 * count) for index in range(count)]
    calls = [ids[:_PROMPT_TOKENS], *([token] for token in ids[_PROMPT_TOKENS:])]
    held, rounded = pieces.new(), rounded_caches(pieces.new())
    return max(largest(_logits(model, c, held), _logits(model, c, rounded)) for c in calls)


def _logits(model: Module, ids: list[int], caches: Caches) -> mx.array:
    logits: mx.array = model(mx.array([ids]), cache=caches)[0].astype(mx.float32)
    mx.eval(logits)
    return logits
