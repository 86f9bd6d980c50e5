"""The planned size of the KV cache, compared with the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Token
from support.rows import GREEDY
from support.sweeps import diagonal
from tools.local_batch import LocalBatch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.planning.kv_memory import probe  # noqa: E402
from runner_server.mlx_backend.planning.measure import PREFILL_CHUNK, device_kind  # noqa: E402
from runner_server.mlx_backend.upstream.names import load_model, make_prompt_cache  # noqa: E402
from tools.memory.models import scaled, write_model  # noqa: E402

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]


def held_bytes(batch: Any) -> int:
    """Return the bytes held by the caches of a batch's rows."""
    executor = batch.executor
    rows = [row.caches for row in executor._outside.values()]
    return sum(cache.nbytes for caches in (*rows, executor._decoding._caches) for cache in caches)


@pytest.mark.parametrize(
    ("rows", "prompt_tokens", "shape"),
    diagonal([1, 3], [3, 200, 600], ["llama", "qwen3", "gemma3"]),
)
def test_the_estimate_covers_the_real_cache(
    load: Load, model_dir: Build, shape: str, prompt_tokens: int, rows: int
) -> None:
    context = prompt_tokens + 20
    model: Any = load(model_dir(shape), parallel=rows, context_length=context)
    batch = LocalBatch.of(model)
    for row in range(rows):
        batch.add(row, [1 + i % 500 for i in range(prompt_tokens)], GREEDY)
    made = 0
    most = 0
    while made < rows * 20:
        made += sum(isinstance(event, Token) for event in batch.step())
        most = max(most, held_bytes(batch))
    batch.close()
    seen = probe(model._model, PREFILL_CHUNK[device_kind()])
    assert most <= seen.kv_bytes(context) * rows
    # Caches grow by 256 tokens, so short contexts are overestimated.
    assert seen.kv_bytes(context) * rows <= most + rows * seen.kv_bytes(256)


def test_removing_a_row_frees_its_cache(load: Load, model_dir: Build) -> None:
    model = load(model_dir(), parallel=8, prefix_cache_bytes=0)
    batch: Any = LocalBatch.of(model)
    mx.clear_cache()
    before = mx.get_active_memory()
    for row in range(4):
        batch.add(row, [1] * 300, GREEDY)
    while len(batch.executor._decoding.rows) < 4:
        batch.step()
    batch.step()
    held = mx.get_active_memory() - before
    batch.remove([0, 1, 2])
    batch.step()
    assert mx.get_active_memory() - before < held * 0.6
    batch.remove([3])
    batch.close()
    del batch
    mx.clear_cache()
    assert mx.get_active_memory() <= before + 64 * 1024


def test_removing_a_row_during_prefill_frees_its_cache(load: Load, model_dir: Build) -> None:
    model = load(model_dir(), parallel=8, prefix_cache_bytes=0)
    batch: Any = LocalBatch.of(model)
    before = mx.get_active_memory()
    batch.add(0, [1] * 1500, GREEDY)
    batch.step()
    batch.step()
    assert held_bytes(batch) > 0
    batch.remove([0])
    assert held_bytes(batch) == 0
    batch.add(1, [2, 3], GREEDY)
    while not any(isinstance(event, Token) for event in batch.step()):
        pass
    batch.close()
    del batch
    assert mx.get_active_memory() <= before + 64 * 1024


def test_the_estimate_covers_caches_defined_by_a_model_type(tmp_path: Path) -> None:
    """Caches of deepseek_v41 have neither keys nor a fixed size; once counted as one token."""
    path = write_model(tmp_path, scaled("deepseek_v41"))
    model, _ = load_model(path)
    seen = probe(model, 128)
    for tokens in (100, 400):
        caches = make_prompt_cache(model)
        model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
        held = sum(cache.nbytes for cache in caches)
        assert held <= seen.kv_bytes(tokens) <= 3 * held
