"""Memory of a model's caches, determined by running the model on lazy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.cache.quantized import parts_of
from runner_server.mlx_backend.planning.sizes import CacheShape, Probe
from runner_server.mlx_backend.upstream.names import make_prompt_cache

_GROWTH_TOKENS = 64


def probe(model: Module, prefill_chunk: int) -> Probe:
    """Pass one token through a model without evaluating anything.

    Lazy arrays have shapes, so this takes no memory and reads no weights. No array may outlive this
    call, because a lazy array keeps everything alive that it would be computed from: a load would
    keep each source tensor in addition to its converted copy.

    Args:
        model: A model with lazy weights.
        prefill_chunk: Most prompt tokens in one prefill chunk.

    Raises:
        ModelUnsupported: The model cannot run on this device.
    """
    caches = make_prompt_cache(model)
    try:
        logits = model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    except Exception as error:
        # Some layers call Metal kernels and have no other implementation.
        raise ModelUnsupported(
            f"mlx_lm cannot run this kind of model on this device ({type(error).__name__}: {error})"
        ) from error
    shapes = list(_shapes(caches, prefill_chunk))
    if own := [index for index, cache in enumerate(caches) if _is_own(cache)]:
        shapes = _with_growth(model, caches, shapes, own)
    return Probe(int(logits.shape[-1]), tuple(shapes))


def _is_own(cache: Any) -> bool:
    """Return whether the model's own module defines a cache's class.

    mlx_lm's cache classes have one of these attributes.
    """
    return not any(hasattr(cache, name) for name in ("keys", "caches", "cache"))


def _with_growth(
    model: Module, caches: list[Any], shapes: list[CacheShape], own: list[int]
) -> list[CacheShape]:
    """Return the shapes, after measuring caches of unknown classes over 64 tokens.

    Their growth is assumed to be linear, which overestimates windows.
    """
    before = {index: int(caches[index].nbytes) for index in own}
    model(mx.zeros((1, _GROWTH_TOKENS), dtype=mx.int32), cache=caches)
    grown = list(shapes)
    for index in own:
        more = int(caches[index].nbytes) - before[index]
        grown[index] = CacheShape(token_bytes=-(-more // _GROWTH_TOKENS), fixed_bytes=before[index])
    return grown


def _shapes(caches: list[Any], prefill_chunk: int) -> Iterator[CacheShape]:
    for cache in caches:
        parts = getattr(cache, "caches", None)
        if parts is not None:
            yield from _shapes(list(parts), prefill_chunk)
        elif getattr(cache, "keys", None) is None:
            yield CacheShape(fixed_bytes=int(cache.nbytes))
        else:
            window = getattr(cache, "max_size", None)
            yield CacheShape(
                token_bytes=sum(part.nbytes // part.shape[2] for part in parts_of(cache)),
                step=cache.step,
                # A chunk is appended before the tokens that left the window are dropped.
                window=window + prefill_chunk if window else None,
            )
