"""Casts of lazy weights to another dtype. MLX converts each weight after reading it."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_map_with_path

from runner_server.mlx_backend.upstream.names import SwitchLinear

_WIDE_EXPERTS = (
    "the weights of its experts are held as float32, which takes twice the memory of 16 bits: MLX "
    "cannot multiply them in 16 bits on a CPU"
)


class _WideSwitchLinear(SwitchLinear):  # type: ignore[misc]
    """An expert layer with float32 weights in a 16-bit model.

    MLX's CPU backend implements the gathered matrix product for float32 only ("[GatherMM::eval]
    Currently only supports float32"), and widens both inputs if one of them is float32.
    """

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        product: mx.array = super().__call__(x, *args, **kwargs)
        return product.astype(x.dtype)


def cast_weights(model: Module, dtype: mx.Dtype) -> None:
    """Cast floating-point weights, respecting the exceptions of the model's class.

    A class excludes weights such as router biases and decays of recurrent states by its
    ``cast_predicate``.

    Args:
        model: A model with lazy weights, none of them quantized.
        dtype: The dtype to cast to.
    """
    may_cast = getattr(model, "cast_predicate", None)
    if may_cast is None or dtype == mx.float32:
        model.set_dtype(dtype)
        return

    def converted(path: str, weight: mx.array) -> mx.array:
        is_cast = mx.issubdtype(weight.dtype, mx.floating) and may_cast(path)
        return weight.astype(dtype) if is_cast else weight

    model.update(cast("Any", tree_map_with_path(converted, model.parameters())))


def widen_experts(model: Module) -> None:
    """Hold 16-bit experts as float32, for devices without a 16-bit gathered product."""
    for _, module in model.named_modules():
        if type(module) is SwitchLinear and module["weight"].dtype != mx.float32:
            module.weight = module["weight"].astype(mx.float32)
            module.__class__ = _WideSwitchLinear


def casting_notes(model: Module) -> list[str]:
    """Return the notes on weights with another dtype than requested."""
    if not any(type(module) is _WideSwitchLinear for _, module in model.named_modules()):
        return []
    return [_WIDE_EXPERTS]
