"""Greedy generation with log probabilities, in this runner's batches and with mlx_lm itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.types import Failure, Prefill, Sampling
from tools.local_batch import LocalBatch

COUNT = 10
"""Number of tokens to generate."""

TOP = 20

_GREEDY = Sampling(temperature=0, logprobs=TOP)


@dataclass
class Row:
    """A prompt and the generated tokens.

    Attributes:
        prompt: Token ids of the prompt.
        join_step: Index of the step before which the row joins the batch.
        tokens: Generated tokens with log probabilities.
        cached: Prompt tokens taken from the prefix cache.
    """

    prompt: Sequence[int]
    join_step: int = 0
    tokens: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0


def generate_in_batch(batch: LocalBatch, rows: Sequence[Row]) -> None:
    """Generate for ``rows`` in one batch that rows join and leave at different steps."""
    waiting, active, step = dict(enumerate(rows)), dict[int, Row](), 0
    while waiting or active:
        for id_ in [id_ for id_, row in waiting.items() if row.join_step <= step]:
            active[id_] = waiting.pop(id_)
            batch.add(id_, active[id_].prompt, _GREEDY)
        if active:
            for id_ in _step(batch, active):
                del active[id_]
        step += 1


def _step(batch: LocalBatch, active: dict[int, Row]) -> list[int]:
    """Run one step and return the rows that have finished."""
    ended = []
    for event in batch.step():
        row = active[event.row]
        if isinstance(event, Failure):
            raise TypeError("logits are not finite")
        if isinstance(event, Prefill):
            row.cached = event.cached
            continue
        row.tokens.append(cast("TokenLogprob", event.logprob))
        if len(row.tokens) == COUNT:
            ended.append(event.row)
    batch.remove(ended)
    return ended


def generate_with_mlx_lm(model: Any, prompt: Sequence[int]) -> list[TokenLogprob]:
    """Generate with mlx_lm's own ``generate_step``."""
    # `mlx_lm.generate` is a function as an attribute of the package.
    from mlx_lm.generate import generate_step

    tokens = []
    for token, logprobs in generate_step(mx.array(list(prompt)), model, max_tokens=COUNT):
        values = logprobs.astype(mx.float32)
        ids = mx.argsort(-values)[:TOP]
        top = zip(cast("list[int]", ids.tolist()), values[ids].tolist(), strict=True)
        tokens.append(TokenLogprob(int(token), float(values[token].item()), tuple(top)))
    return tokens


def mlx_lm_model(path: Path, *, dequantize: bool) -> Any:
    """Load a model with mlx_lm only.

    Args:
        path: Model directory.
        dequantize: Dequantize the weights to float32.
    """
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(path)
    if dequantize:
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model
