"""Trial of a loaded model: whether it generates a token from finite logits."""

from __future__ import annotations

import logging
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from runner_server.engine.backend import Executor
from runner_server.engine.types import CachePolicy, Sampling, Token
from runner_server.engine.work import DecodeItem, PrefillItem, PromptChunk
from runner_server.errors import GenerationFailed, ModelUnsupported, not_finite_advice
from runner_server.mlx_backend.planning.measure import device_kind

logger = logging.getLogger(__name__)

_PROMPT = (0, 0)


def warm_up(model: Module, executor: Executor, vocab_size: int, dtype: str) -> None:
    """Generate a token, which also compiles the kernels.

    Args:
        model: The model, with its weights in memory.
        executor: An executor of the model without rows; closed afterwards.
        vocab_size: Number of token ids scored by the output layer.
        dtype: The dtype of the weights, for the message.

    Raises:
        ModelUnsupported: The logits are NaN or infinite.
        GenerationFailed: The model raises.
    """
    try:
        has_answered = _gives_token(executor, Sampling(top_k=min(2, vocab_size)))
    except Exception as error:
        logger.exception("warm-up failed")
        raise GenerationFailed(_advice(error)) from error
    finally:
        executor.close()
    if not has_answered:
        raise _not_finite(model, dtype)


def _gives_token(executor: Executor, sampling: Sampling) -> bool:
    """Generate one token; return False if the logits are not finite."""
    executor.add(0, _PROMPT, sampling, CachePolicy())
    chunk = PromptChunk(0, restored=0, count=len(_PROMPT) - 1, is_stored=False)
    executor.run(PrefillItem((chunk,)))
    (event,) = executor.run(DecodeItem(joining=(0,))).events
    return isinstance(event, Token)


def _not_finite(model: Module, dtype: str) -> ModelUnsupported:
    broken = _broken_weight(model)
    cause = f"the weight {broken} is not" if broken else "all of its weights are"
    return ModelUnsupported(
        "the model's logits are not finite (NaN or infinity) at its first token, with weights held "
        f"as {dtype}; {cause} finite: {not_finite_advice(dtype)}"
    )


def _broken_weight(model: Module) -> str | None:
    """Return the name of the first weight containing NaN or infinity."""
    named = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    for name, weight in named:
        is_floating = mx.issubdtype(weight.dtype, mx.floating)
        if is_floating and not mx.all(mx.isfinite(weight)).item():
            return name
    return None


def _advice(error: Exception) -> str:
    advice = (
        f"the loaded model raised {type(error).__name__} at its first token; the runner's log has "
        "the traceback"
    )
    if device_kind() == "cpu":
        # Without g++ MLX does not fuse kernels; with a broken one it raises.
        advice += "; a g++ that does not work is a known cause: `mlx-runner doctor` tries it"
    return advice
