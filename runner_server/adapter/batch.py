"""A batch of rows on mlx_lm's BatchGenerator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.adapter.names import BatchGenerator
from runner_server.adapter.sampling import RowSampler, Sampler, greedy, processors
from runner_server.messages import Prefill, Sampling, Token

_UNBOUNDED = 2**31 - 1
"""The engine ends rows itself: length, end of text and stop strings in one place."""

_PREFILL_ROWS = 4
"""Prompts evaluated side by side; padding grows with more."""


class _Float32Logits:
    """A model whose logits are float32.

    In half precision mlx_lm would round them when it normalizes, but not beside a row
    whose penalties are computed in float32: a row would depend on its neighbours, and
    the likeliest token need not win.
    """

    def __init__(self, model: Module) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        logits: mx.array = self._model(*args, **kwargs)
        return logits.astype(mx.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class MlxBatch:
    """Prefills and decodes rows together.

    Args:
        model: The evaluated model.
        parallel: How many rows there are at most.
        prefill_chunk: Tokens of each prompt that one step evaluates.
    """

    def __init__(self, model: Module, parallel: int, prefill_chunk: int) -> None:
        self._prefill_rows = min(parallel, _PREFILL_ROWS)
        self._generator = BatchGenerator(
            _Float32Logits(model),
            completion_batch_size=parallel,
            prefill_batch_size=self._prefill_rows,
            prefill_step_size=prefill_chunk,
        )
        self._uid_of: dict[int, int] = {}
        self._row_of: dict[int, int] = {}
        self._recording: dict[int, RowSampler] = {}
        self._prefilling: set[int] = set()

    @property
    def can_prefill(self) -> bool:
        """Whether one more prompt would be evaluated at once; see ``Batch.can_prefill``."""
        return len(self._prefilling) < self._prefill_rows

    def add(self, row: int, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Begins a row; see ``Batch.add``."""
        steps = processors(sampling)
        sampler: Sampler = greedy
        if sampling.logprobs is not None:
            self._recording[row] = sampler = recorder = RowSampler(sampling)
            steps = [recorder.capture, *steps]
        elif sampling.temperature > 0:
            sampler = RowSampler(sampling)
        (uid,) = self._generator.insert(
            [list(prompt_ids)],
            max_tokens=[_UNBOUNDED],
            samplers=[sampler],
            logits_processors=[steps],
        )
        self._uid_of[row], self._row_of[uid] = uid, row
        self._prefilling.add(row)

    def remove(self, rows: Collection[int]) -> None:
        """Ends rows; see ``Batch.remove``."""
        uids = [self._uid_of.pop(row) for row in rows]
        self._generator.remove(uids)
        for row, uid in zip(rows, uids, strict=True):
            del self._row_of[uid]
            self._recording.pop(row, None)
            self._prefilling.discard(row)

    def step(self) -> list[Prefill | Token]:
        """Makes one step; see ``Batch.step``."""
        prompts, generated = self._generator.next()
        events: list[Prefill | Token] = [
            self._token(answer.uid, answer.token) for answer in generated
        ]
        for answer in prompts:
            evaluated, total = answer.progress
            if answer.end_of_prompt:
                self._prefilling.discard(self._row_of[answer.uid])
            # The last token is decoded in the next step, whose answer is the news.
            if evaluated < total - 1:
                events.append(Prefill(self._row_of[answer.uid], evaluated, total))
        return events

    def close(self) -> None:
        """Frees everything; see ``Batch.close``."""
        self._generator.remove(list(self._row_of))
        self._generator.close()

    def _token(self, uid: int, token_id: int) -> Token:
        row = self._row_of[uid]
        recorder = self._recording.get(row)
        return Token(row, token_id, recorder.next_logprob(token_id) if recorder else None)
