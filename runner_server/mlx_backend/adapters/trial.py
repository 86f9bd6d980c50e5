"""Trial of a loaded model's adapters: each alone, and rows with different ones together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.adapters.selection import BASE, Attached
from runner_server.mlx_backend.cache.row_caches import CachePieces, Caches
from runner_server.mlx_backend.loading.batch_trial import logits_of, try_together


def require_finite(model: Module, new_caches: Callable[[], Caches], adapters: Attached) -> None:
    """Compute the logits of one token with each adapter.

    Raises:
        ModelUnsupported: They are NaN or infinite with an adapter.
    """
    for name in adapters.names:
        with adapters.selection.of([adapters.number(name)]):
            logits = logits_of(model, [0], new_caches())
        # Some types mask tokens with -inf.
        if mx.any(mx.isnan(logits) | mx.isposinf(logits)).item():
            raise ModelUnsupported(
                f"with the adapter {name!r}, the model's logits are not finite (NaN or infinity): "
                "the adapter's file is damaged, or was made for another model"
            )


def try_mixed(
    model: Module, pieces: CachePieces, vocab_size: int, rows: int, adapters: Attached
) -> str | None:
    """Return why rows with different adapters must not be decoded together; None if they may.

    Adapters that change the same layers are tried once.

    Args:
        model: The model, with weights read.
        pieces: Creates the model's caches.
        vocab_size: Number of token ids scored by the output layer.
        rows: Maximum number of rows, at least 2.
        adapters: The model's adapters.
    """
    kinds = {layers: number for number, layers in enumerate(adapters.layers, 1)}
    for number in sorted(kinds.values()):
        others = BASE, *(each for each in kinds.values() if each != number)
        numbers = (number, *others, BASE)

        def select(
            indices: Sequence[int], numbers: Sequence[int] = numbers
        ) -> AbstractContextManager[None]:
            return adapters.selection.of([numbers[index] for index in indices])

        if why := try_together(model, pieces, vocab_size, rows, select):
            return f"with adapters, {why}"
    return None
