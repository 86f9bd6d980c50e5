"""Trial of a loaded model: whether it decodes several rows together correctly.

mlx_lm's models are written for one sequence, and most of them happen to be right for several
sequences of different lengths too. A trace before weights are read finds the models that raise
(:func:`runner_server.mlx_backend.planning.working_memory.require_batches`). This trial finds the
models that compute a wrong answer: it decodes rows together and alone, and compares the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from runner_server.mlx_backend.cache.row_caches import CachePieces, Caches, extend, merge, prefill
from runner_server.mlx_backend.planning.measure import device_kind
from runner_server.mlx_backend.stream_errors import recover

logger = logging.getLogger(__name__)

_LENGTHS = (5, 1, 2)
"""Numbers of prompt tokens. The second row joins with empty caches, the third with fewer tokens
than the window of most recurrent states."""


_TOLERANCE = 0.01
"""Tolerance for float32 on a CPU, in standard deviations. Rounding caused at most 7e-6 (OpenBLAS,
models of 100 M, trained and random), an offset that counts padding (afm7) caused 0.4."""

_TOLERANCE_16_BITS = 0.25
"""Tolerance for other dtypes, and for GPUs, which multiply float32 with fewer bits. On a CPU,
rounding in 16 bits causes next to nothing either. On a GPU, batched and single products may differ
in each bit of bfloat16, and select other experts."""


Select = Callable[[Sequence[int]], AbstractContextManager[object]]


def _select_nothing(_rows: Sequence[int]) -> AbstractContextManager[object]:
    return nullcontext()


def try_together(
    model: Module,
    pieces: CachePieces,
    vocab_size: int,
    rows: int,
    select: Select = _select_nothing,
) -> str | None:
    """Return why rows of a model must not be decoded together; None if they may.

    See :func:`deviation` for the arguments.
    """
    try:
        found = deviation(model, pieces, vocab_size, rows, select)
    except Exception as error:  # noqa: BLE001 - one row alone works, so the batch is at fault
        recover()
        return f"{type(error).__name__}: {error}"
    if found <= tolerance(model):
        return None
    return f"logits differ from those of each alone by up to {found:.2g} standard deviations"


def deviation(
    model: Module,
    pieces: CachePieces,
    vocab_size: int,
    rows: int,
    select: Select = _select_nothing,
) -> float:
    """Decode one token of several rows, together and alone, and compare the logits.

    Args:
        model: The model, with weights read.
        pieces: Creates the model's caches.
        vocab_size: Number of token ids scored by the output layer.
        rows: Maximum number of rows, at least 2; the trial uses up to three.
        select: Returns the context of a call, given the rows in it.

    Returns:
        The largest difference between two logits, in standard deviations of the row's logits.
    """
    prompts = _prompts(vocab_size)[:rows]
    caches = [pieces.new() for _ in prompts]
    for index, (own, prompt) in enumerate(zip(caches, prompts, strict=True)):
        if prompt[1:]:
            with select([index]):
                prefill(model, [own], [prompt[:-1]])
    last = [prompt[-1] for prompt in prompts]
    batch = merge(caches[:2], len(caches))
    if caches[2:]:
        extend(batch, caches[2:], len(caches))
    with select(range(len(caches))):
        together = logits_of(model, last, batch)
    alone = []
    # After the batch, because a step modifies the caches it is given.
    for index, (token, own) in enumerate(zip(last, caches, strict=True)):
        with select([index]):
            alone.append(logits_of(model, [token], own))
    return largest(together, mx.concatenate(alone))


def tolerance(model: Module) -> float:
    """Return the largest deviation rounding can explain."""
    weights = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    is_wide = all(weight.dtype == mx.float32 for _, weight in weights)
    return _TOLERANCE if is_wide and device_kind() == "cpu" else _TOLERANCE_16_BITS


def _prompts(vocab_size: int) -> list[list[int]]:
    """Return prompts with ids spread over the whole vocabulary."""
    total = sum(_LENGTHS)
    ids = iter([(2 * index + 1) * vocab_size // (2 * total) for index in range(total)])
    return [[next(ids) for _ in range(length)] for length in _LENGTHS]


def logits_of(model: Module, tokens: Sequence[int], caches: Caches) -> mx.array:
    """Return the logits of the next token of rows with one input each."""
    inputs = mx.array(list(tokens), dtype=mx.uint32)[:, None]
    logits: mx.array = model(inputs, cache=caches)[:, -1, :].astype(mx.float32)
    mx.eval(logits)
    return logits


def largest(together: mx.array, alone: mx.array) -> float:
    """Return the largest difference of two logits, in standard deviations of ``alone``."""
    # Logits of -inf, with which some types mask tokens, count as equal.
    is_barred = mx.isinf(together) & mx.isinf(alone)
    difference = mx.where(is_barred, 0.0, mx.abs(together - alone))
    spread = mx.std(mx.where(is_barred, 0.0, alone), axis=-1, keepdims=True)
    return cast("float", mx.max(difference / mx.maximum(spread, 1e-9)).item())
