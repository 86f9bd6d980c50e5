"""Buffers that MLX keeps for reuse, between prefill and decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

import mlx.core as mx

from runner_server.engine.prefix_cache import PrefixCache
from runner_server.engine.types import CachePolicy
from runner_server.engine.work import DecodeItem, PrefillItem, PromptChunk
from runner_server.mlx_backend import executor as module
from runner_server.mlx_backend.batch_budget import BatchBudget
from runner_server.mlx_backend.executor import MlxExecutor
from support.rows import GREEDY

LIMIT = 1 << 23
BUFFER = LIMIT - (1 << 17)

Run = Callable[[], int]
"""Prefills and decodes a row while other buffers fill the limit; returns the bytes kept then."""


@pytest.fixture
def run(trained: Any) -> Iterator[Run]:
    before = mx.set_cache_limit(LIMIT)
    budget = BatchBudget(buffer_bytes=LIMIT)
    cache: Any = PrefixCache(trained._pieces, 0)
    rows = MlxExecutor(
        trained._model, trained.info.vocab_size, trained._pieces, cache, budget=budget
    )

    def run() -> int:
        rows.add(0, (5, 6, 7), GREEDY, CachePolicy())
        rows.run(PrefillItem((PromptChunk(0, 0, 2, is_stored=False),)))
        mx.clear_cache()
        buffer = mx.arange(BUFFER // 4, dtype=mx.float32)
        mx.eval(buffer)
        del buffer
        assert BUFFER <= mx.get_cache_memory() <= LIMIT
        rows.run(DecodeItem(joining=(0,)))
        return int(mx.get_cache_memory())

    yield run
    rows.close()
    mx.clear_cache()
    mx.set_cache_limit(before)


def test_those_of_prefill_make_room_for_the_logits_of_steps(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEW_BYTES", 0)
    monkeypatch.setattr(module, "_LOGITS_ARRAYS", 100)
    assert 0 < run() < BUFFER


def test_small_logits_are_no_reason_to_free_them(run: Run) -> None:
    assert run() >= BUFFER
