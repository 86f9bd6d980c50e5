"""Operations for training on the CPU, faster than MLX's own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import llama
from mlx_lm.models.llama import Model


def exponential(value: mx.array) -> mx.array:
    """Approximate e**value between -20 and 20, to a few parts in ten thousand.

    MLX's CPU backend computes ``exp`` one element at a time, ten times slower than these
    multiplications, which dominates a training step. The stopped gradients give the result the
    exact derivative, itself, without differentiating the polynomial.
    """
    small = mx.clip(value, -20.0, 20.0) / 32
    power = mx.array(1.0)
    for order in range(6, 0, -1):
        power = 1 + small * power / order
    for _ in range(5):
        power = power * power
    return mx.stop_gradient(power) * (1 + value - mx.stop_gradient(value))


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **_: object
) -> mx.array:
    """Compute causal attention, replacing MLX's during training."""
    rows, heads, length, width = queries.shape
    groups = keys.shape[1]
    scores = (queries * scale).reshape(rows, groups, -1, width) @ keys.swapaxes(-1, -2)
    future = mx.triu(mx.full((length, length), -1e4), 1)
    scores = scores.reshape(rows, groups, heads // groups, length, length) + future
    weights = exponential(scores - mx.stop_gradient(scores.max(-1, keepdims=True)))
    weights = weights / weights.sum(-1, keepdims=True)
    mixed = weights.reshape(rows, groups, -1, length) @ values
    return mixed.reshape(rows, heads, length, width)


def swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """Compute the gated activation, replacing MLX's during training."""
    return gate * value / (1 + exponential(-gate))


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the cross-entropy of each token."""
    top = mx.stop_gradient(logits.max(-1, keepdims=True))
    total = mx.log(exponential(logits - top).sum(-1, keepdims=True)) + top
    return (total - mx.take_along_axis(logits, targets[..., None], -1)).squeeze(-1)


def exact_loss(model: Model, inputs: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the loss computed with MLX's own operations, as at inference."""
    losses = nn.losses.cross_entropy(model(inputs), targets)
    return (losses * weights).sum() / weights.sum()


def make_loss(streams: Sequence[Any]) -> Callable[..., mx.array]:
    """Build a loss that computes one slice of the batch on each stream.

    MLX runs element-wise operations on one thread per stream, and these dominate a step: with two
    streams, a step on two cores is almost twice as fast.
    """

    def loss(model: Model, *batch: mx.array) -> mx.array:
        parts = []
        slices = zip(*(mx.split(part, len(streams)) for part in batch), strict=True)
        for stream, (given, wanted, weights) in zip(streams, slices, strict=True):
            with mx.stream(stream):
                parts.append((cross_entropy(model(given), wanted) * weights).sum())
        return mx.stack(parts).sum() / batch[-1].sum()

    return loss


@contextmanager
def fast_layers() -> Iterator[None]:
    """Trace the model with the fast operations."""
    kept = llama.scaled_dot_product_attention, llama.swiglu
    llama.scaled_dot_product_attention, llama.swiglu = attention, swiglu
    try:
        yield
    finally:
        llama.scaled_dot_product_attention, llama.swiglu = kept
