"""Search for the part of a model with the final hidden states as its result.

Most of mlx_lm's models are a base model and an output layer, like those of transformers, but the
attributes differ. A candidate is taken only if the model's own logits prove it: an output layer of
the model, applied to its states, must give them. So no list of architectures is needed, and a state
before the last norm, or one that is scaled for each token, is never taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.mlx_backend.cache.row_caches import Caches

Body = Callable[..., mx.array]
"""Called with tokens (rows x length) and ``cache``; returns states (rows x length x size)."""

_BODIES = ("model", "transformer", "backbone")

_TOLERANCE = 0.05
"""Largest difference between two logits, in standard deviations. The same layer is applied to the
same states, so only the rounding of a factor or a cap in 16 bits remains, a few thousandths."""


def find_body(model: Module) -> Body | None:
    """Return the candidate for a model's base model; None without one."""
    owner = _text_model(model)
    found = (getattr(owner, name, None) for name in _BODIES)
    return next((body for body in found if isinstance(body, Module)), None)


def why_not_hidden(
    model: Module, body: Body, new_caches: Callable[[], Caches], ids: Sequence[int]
) -> str | None:
    """Return why a body does not give the final hidden states; None if proven.

    Args:
        model: The model, with its weights in memory.
        body: The candidate.
        new_caches: Creates empty caches of the model.
        ids: Tokens to try.
    """
    tokens = mx.array([list(ids)])
    logits = model(tokens, cache=new_caches()).astype(mx.float32)
    try:
        states = body(tokens, cache=new_caches())
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    cap = _cap(model)
    differences = (_difference(logits, head, states, cap) for head in _heads(model, body))
    least = min(differences, default=math.inf)
    if least <= _TOLERANCE:
        return None
    return f"no output layer gives the model's logits for them, by {least:.2g} standard deviations"


def _text_model(model: Module) -> Any:
    owner: Any = model
    while isinstance(inner := getattr(owner, "language_model", None), Module):
        owner = inner
    return owner


def _heads(model: Module, body: Body) -> Iterator[Callable[[mx.array], mx.array]]:
    """Yield what may be the output layer: modules beside the body, and tied embeddings."""
    owner = _text_model(model)
    for parent in (owner, body):
        for child in cast("Module", parent).children().values():
            if linear := getattr(child, "as_linear", None):
                yield linear
            elif isinstance(child, Module) and parent is owner and child is not body:
                yield child


def _cap(model: Module) -> float:
    """Return the limit of softly capped logits; 0 without a cap."""
    owner = _text_model(model)
    holders = (owner, getattr(owner, "args", None))
    caps = (getattr(holder, "final_logit_softcapping", None) for holder in holders)
    return next((float(cap) for cap in caps if cap), 0.0)


def _difference(
    logits: mx.array, head: Callable[[mx.array], mx.array], states: mx.array, cap: float
) -> float:
    """Return the largest difference between logits and the result of a head, up to a factor.

    Returns:
        The difference in standard deviations of the logits; infinity if the head does not fit.
    """
    try:
        others = head(states).astype(mx.float32)
        mx.eval(others)
        if cap:
            others = cap * mx.tanh(others / cap)
        # Logits of -inf, with which some types mask tokens.
        is_barred = mx.isinf(logits)
        logits, others = (mx.where(is_barred, 0.0, each) for each in (logits, others))
    except (AttributeError, IndexError, TypeError, ValueError):
        return math.inf
    scale = mx.sum(logits * others) / mx.maximum(mx.sum(others * others), 1e-30)
    largest = mx.max(mx.abs(logits - scale * others)) / mx.maximum(mx.std(logits), 1e-30)
    found, factor = cast("tuple[float, float]", (largest.item(), scale.item()))
    return found if factor > 0 else math.inf
