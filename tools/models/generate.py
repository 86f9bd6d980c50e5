"""Greedy generations with log probabilities: of this runner's batches, and of mlx_lm itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from runner_server.engine.backend import Batch
from runner_server.engine.types import NotFinite, Prefill, Sampling, TokenLogprob

COUNT = 10
"""Tokens of each generation."""

TOP = 20

_GREEDY = Sampling(temperature=0, logprobs=TOP)


@dataclass
class Row:
    """A prompt, and what was generated for it.

    Attributes:
        prompt: Its token ids.
        late: The step before which it joins the batch.
        said: The tokens.
        cached: Of the prompt, tokens that were not evaluated again.
    """

    prompt: Sequence[int]
    late: int = 0
    said: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0


def together(batch: Batch, rows: Sequence[Row]) -> None:
    """Generate for rows in one batch; each joins and leaves at its own time."""
    waiting, active, step = dict(enumerate(rows)), dict[int, Row](), 0
    while waiting or active:
        for id_ in [id_ for id_, row in waiting.items() if row.late <= step]:
            active[id_] = waiting.pop(id_)
            batch.add(id_, active[id_].prompt, _GREEDY)
        if active:
            for id_ in _step(batch, active):
                del active[id_]
        step += 1


def _step(batch: Batch, active: dict[int, Row]) -> list[int]:
    """Make a step; returns the rows that have ended."""
    ended = []
    for event in batch.step():
        row = active[event.row]
        if isinstance(event, NotFinite):
            raise TypeError("logits are not finite")
        if isinstance(event, Prefill):
            row.cached = event.cached
            continue
        row.said.append(cast("TokenLogprob", event.logprob))
        if len(row.said) == COUNT:
            ended.append(event.row)
    batch.remove(ended)
    return ended


def by_mlx_lm(model: Any, prompt: Sequence[int]) -> list[TokenLogprob]:
    """Generate with mlx_lm's own ``generate_step``."""
    # The package's name for it is that of a function.
    from mlx_lm.generate import generate_step

    said = []
    for token, logprobs in generate_step(mx.array(list(prompt)), model, max_tokens=COUNT):
        values = logprobs.astype(mx.float32)
        ids = mx.argsort(-values)[:TOP]
        top = zip(cast("list[int]", ids.tolist()), values[ids].tolist(), strict=True)
        said.append(TokenLogprob(int(token), float(values[token].item()), tuple(top)))
    return said


def mlx_lm_model(path: Path, *, wide: bool) -> Any:
    """Load with mlx_lm alone.

    Args:
        path: The model's directory.
        wide: Dequantize it, to float32.
    """
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(path)
    if wide:
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model
