"""How much a model's KV cache takes, asked of the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.adapter.names import make_prompt_cache
from runner_server.errors import ModelUnsupported


@dataclass(frozen=True)
class Probe:
    """What one token through the unread model shows.

    Attributes:
        vocab_size: Token ids the output layer scores.
        caches: The caches of its layers, with the shapes of one step.
    """

    vocab_size: int
    caches: list[Any]

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of all layers' caches for one sequence of ``tokens``."""
        return sum(_cache_bytes(cache, tokens) for cache in self.caches)

    @property
    def kv_item_size(self) -> int:
        """Bytes of one number in the caches, as the unread model would hold them."""
        return max((_item_size(cache) for cache in self.caches), default=4)


def probe(model: Module) -> Probe:
    """Puts one token through a model without evaluating anything.

    Lazy arrays know their shapes, so this costs no memory and reads no weights.

    Raises:
        ModelUnsupported: Its caches cannot be batched.
    """
    caches = make_prompt_cache(model)
    unbatchable = {type(cache).__name__ for cache in caches if not hasattr(cache, "merge")}
    if unbatchable:
        raise ModelUnsupported(
            f"caches of kind {', '.join(sorted(unbatchable))} cannot be decoded in a batch"
        )
    logits = model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    return Probe(int(logits.shape[-1]), caches)


def _cache_bytes(cache: Any, tokens: int) -> int:
    parts = getattr(cache, "caches", None)
    if parts is not None:
        return sum(_cache_bytes(part, tokens) for part in parts)
    keys = getattr(cache, "keys", None)
    if keys is None:
        return int(cache.nbytes)  # a recurrent state: the same for every length
    step = getattr(cache, "step", 1)
    held = -(-tokens // step) * step
    window = getattr(cache, "max_size", None)
    if window:
        held = min(held, window)
    return int((keys.nbytes + cache.values.nbytes) / keys.shape[2] * held)


def _item_size(cache: Any) -> int:
    keys = getattr(cache, "keys", None)
    return int(keys.dtype.size) if keys is not None else 4
