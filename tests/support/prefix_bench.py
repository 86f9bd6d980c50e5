"""A real model with a prefix cache, stepped by the test, on a clock that counts tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.prefix_cache import PrefixCache
from runner_server.engine.types import CachePolicy, Prefill, Sampling, Token
from runner_server.mlx_backend.executor import MlxExecutor
from support.rows import GREEDY
from tools.local_batch import LocalBatch

CHUNK = 64
PACE = 2000.0
PLENTY = 1 << 28
MAX_STEPS = 3000
WITH_LOGPROBS = replace(GREEDY, logprobs=8)


class CountingModel:
    """Model which counts input tokens, and derives a clock from the count.

    Attributes:
        tokens: Number of tokens processed, over all rows.
        failures: Raised by the next calls, one per call.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.tokens = 0
        self.failures: list[Exception] = []

    def __call__(self, inputs: Any, cache: Any) -> Any:
        """Call the model."""
        if self.failures:
            raise self.failures.pop(0)
        self.tokens += inputs.size
        return self._model(inputs, cache=cache)

    def clock(self) -> float:
        """Return the time in seconds, at ``PACE`` tokens per second."""
        return self.tokens / PACE


@dataclass
class Result:
    """Results of a row."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    progress: list[Prefill] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Number of prompt tokens taken from the prefix cache."""
        return self.progress[-1].cached


class Bench:
    """A model with a prefix cache and a batch stepped by the test."""

    def __init__(self, model: Any, budget: int = PLENTY) -> None:
        self.counting: Any = CountingModel(model._model)
        self.vocab_size = model.info.vocab_size
        self.pieces = model._pieces
        self.cache: Any = PrefixCache(self.pieces, budget)
        self.limits = replace(model.prefill_limits, max_chunk=CHUNK, max_tokens=4 * CHUNK)
        self.results: dict[int, Result] = {}
        self.renew()

    def renew(self) -> None:
        """Start a new batch on the same prefix cache."""
        executor = MlxExecutor(
            self.counting, self.vocab_size, self.pieces, self.cache, self.counting.clock
        )
        self.batch = LocalBatch(executor, self.limits)

    def add(
        self,
        row: int,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        cache_policy: CachePolicy | None = None,
    ) -> Result:
        """Start a row."""
        self.batch.add(row, prompt, sampling, cache_policy)
        self.results[row] = Result()
        return self.results[row]

    def step(self) -> None:
        """Make a step and check the invariants."""
        for event in self.batch.step():
            result = self.results[event.row]
            if isinstance(event, Prefill):
                self._note(result, event)
                continue
            assert isinstance(event, Token)
            result.ids.append(event.token_id)
            if event.logprob:
                result.logprobs.append(event.logprob)
        assert self.cache.nbytes <= self.cache.usage.limit_bytes

    def _note(self, result: Result, event: Prefill) -> None:
        last = result.progress[-1] if result.progress else Prefill(event.row, 0, event.total)
        assert not result.ids, "progress after a token"
        assert last.prefilled <= event.prefilled < event.total
        assert last.cached <= event.cached <= event.prefilled
        result.progress.append(event)

    def run(
        self,
        prompt: Sequence[int],
        count: int,
        sampling: Sampling = GREEDY,
        cache_policy: CachePolicy | None = None,
    ) -> Result:
        """Run a row from start to end in the current batch."""
        row = len(self.results)
        result = self.add(row, prompt, sampling, cache_policy)
        for _ in range(MAX_STEPS):
            self.step()
            if len(result.ids) >= count:
                self.batch.remove([row])
                return result
        raise AssertionError("the row does not end")

    def run_counting(self, prompt: Sequence[int], count: int = 1) -> tuple[int, Result]:
        """Run a row; return the number of tokens the model processed, and the results."""
        before = self.counting.tokens
        result = self.run(prompt, count)
        return self.counting.tokens - before, result


MakeBench = Callable[..., Bench]


def random_prompt(length: int, seed: int) -> list[int]:
    """Return a prompt of random ids."""
    draw = random.Random(seed)  # noqa: S311 - prompts
    return [draw.randrange(1, 500) for _ in range(length)]
