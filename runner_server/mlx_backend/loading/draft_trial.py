"""Trial of a loaded model with a draft.

A draft is checked by a call of the model with several tokens, in which none may attend to those
after it. That is not so for every type: in mlx_lm 0.32.2 a ``phi3small`` model adds the mask to the
attention scores as numbers, so that all tokens of a call see each other.
"""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.mlx_backend.cache.row_caches import CachePieces, cut_back
from runner_server.mlx_backend.loading.batch_trial import largest, logits_of, tolerance
from runner_server.mlx_backend.stream_errors import recover


def try_drafts(model: Module, pieces: CachePieces, vocab_size: int) -> str | None:
    """Return the reason against drafts with a model; None if the model checks drafts correctly.

    Args:
        model: The model, with weights read.
        pieces: Creates the model's caches, which can be cut back.
        vocab_size: Number of token ids scored by the output layer.
    """
    try:
        found = deviation(model, pieces, vocab_size)
    except Exception as error:  # noqa: BLE001 - steps without a draft work
        recover()
        return f"{type(error).__name__}: {error}"
    if found <= tolerance(model):
        return None
    return f"logits differ from those of single steps by up to {found:.2g} standard deviations"


def deviation(model: Module, pieces: CachePieces, vocab_size: int) -> float:
    """Compare the logits of a single step with those of a call with two more tokens.

    Returns:
        The largest difference of its logits, in standard deviations.
    """
    caches = pieces.new()
    first, second, third, fourth = ((2 * index + 1) * vocab_size // 8 for index in range(4))
    logits_of(model, [first], caches)
    alone = logits_of(model, [second], caches)
    cut_back(caches, 1)
    together: mx.array = model(mx.array([[second, third, fourth]]), cache=caches)[0, :1]
    return largest(together.astype(mx.float32), alone)
