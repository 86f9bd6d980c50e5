"""Greedy generation with log probabilities, in this runner's batches and with mlx_lm itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from runner_server.engine.backend import LoadedModel
from runner_server.engine.embedding.types import Embedded
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.types import Failure, Prefill, Sampling
from tools.local_batch import LocalBatch, decode_with_drafts, start_alone

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
        if isinstance(event, Failure | Embedded):
            raise TypeError("logits are not finite, or an event is not of a row")
        if isinstance(event, Prefill):
            row.cached = event.cached
            continue
        row.tokens.append(cast("TokenLogprob", event.logprob))
        if len(row.tokens) == COUNT:
            ended.append(event.row)
    batch.remove(ended)
    return ended


def generate_with_drafts(model: LoadedModel, row: Row, ids: Sequence[int]) -> None:
    """Generate for a row with drafts of four tokens, every second one wrong at the third token.

    Args:
        model: A model that takes drafts.
        row: The row.
        ids: The tokens that the row generates without drafts.
    """

    def draft(done: int) -> list[int]:
        right = list(ids[done : done + 4])
        is_wrong = len(drafts) % 2 == 0 and len(right) > 2
        drafts.append([*right[:2], right[2] + 1, *right[3:]] if is_wrong else right)
        return drafts[-1]

    drafts: list[list[int]] = []
    tokens, drafted = decode_with_drafts(start_alone(model, row.prompt, _GREEDY), COUNT, draft)
    if not drafted:
        raise RuntimeError("no draft was checked")
    row.tokens = [cast("TokenLogprob", token.logprob) for token in tokens]


def generate_with_mlx_lm(
    model: Any, prompt: Sequence[int], caches: Sequence[Any] | None = None
) -> list[TokenLogprob]:
    """Generate with mlx_lm's own ``generate_step``, in its usual caches or given ones."""
    # `mlx_lm.generate` is a function as an attribute of the package.
    from mlx_lm.generate import generate_step

    tokens = []
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=COUNT, prompt_cache=caches)
    for token, logprobs in steps:
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
