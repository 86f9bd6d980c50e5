"""Prediction of a computation's memory from its graph, without evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.planning.graph_memory import transient_bytes  # noqa: E402
from runner_server.mlx_backend.planning.working_memory import (  # noqa: E402
    batch_prefill_bytes,
    decode_bytes,
    prefill_bytes,
)
from runner_server.mlx_backend.upstream.names import load_model, make_prompt_cache  # noqa: E402

Build = Callable[..., Path]
MIB = 1 << 20
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64},
    "gemma3": {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64},
    "mamba2": {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "intermediate_size": 512},
    "lfm2": {"hidden_size": 256, "block_dim": 256, "block_ff_dim": 768},
}


def square() -> Any:
    return mx.zeros((512, 512))  # a MiB of float32


def test_a_chain_holds_two_arrays_at_a_time() -> None:
    def chain(x: Any) -> list[Any]:
        return [mx.sum(((x @ x) @ x) @ x)]

    assert transient_bytes(chain, [square()]) == 2 * MIB


def test_an_elementwise_result_reuses_the_buffer_of_its_input() -> None:
    assert transient_bytes(lambda x: [mx.sum(mx.exp(mx.abs(x @ x)))], [square()]) == MIB


def test_an_array_needed_later_is_held() -> None:
    def residual(x: Any) -> list[Any]:
        y = x @ x
        return [mx.sum(y + (y @ x) @ x)]

    assert transient_bytes(residual, [square()]) == 3 * MIB


def test_views_take_no_memory_and_copies_do() -> None:
    def views(x: Any) -> list[Any]:
        return [mx.sum(x[:256].T.reshape(2, -1, 128)) + mx.sum(x[None].squeeze(0))]

    # Reshaping the transposed half copies it.
    assert transient_bytes(views, [square()]) == pytest.approx(MIB // 2, abs=64)


def test_results_and_writes_into_inputs_are_not_counted() -> None:
    def update(x: Any, row: Any) -> list[Any]:
        x[3:4] = row
        return [x, x @ x]

    assert transient_bytes(update, [square(), mx.zeros((1, 512))]) == 0


def test_tracing_evaluates_nothing() -> None:
    before = mx.get_active_memory()
    assert transient_bytes(lambda x: [x @ x], [mx.zeros((20_000, 20_000))]) == 0
    assert mx.get_active_memory() - before < MIB


def measured_prefill(model: Any, tokens: int, limit: int) -> int:
    """Return MLX's peak beside weights and caches, with the memory limit at the traced figure."""
    caches = make_prompt_cache(model)
    mx.clear_cache()
    before = mx.get_active_memory()
    model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
    held = sum(cache.nbytes for cache in caches)
    usual = mx.set_memory_limit(before + held + limit)
    mx.reset_peak_memory()
    try:
        mx.eval([cache.state for cache in caches])
    finally:
        mx.set_memory_limit(usual)
    return int(mx.get_peak_memory() - before - held)


@pytest.mark.parametrize("shape", WIDE)
def test_a_prefill_takes_about_the_traced_memory(model_dir: Build, shape: str) -> None:
    model: Any = load_model(model_dir(shape, **WIDE[shape]))[0]
    mx.eval(model.parameters())
    traced = prefill_bytes(model, 384, 384)
    measured = measured_prefill(model, 384, traced)
    assert traced > MIB
    # MLX allocates some operations ahead; a plan adds the buffers kept for reuse.
    assert 0.4 * traced <= measured <= 2 * traced


@pytest.mark.parametrize("shape", WIDE)
def test_tracing_a_model_reads_nothing_and_changes_nothing(model_dir: Build, shape: str) -> None:
    model: Any = load_model(model_dir(shape, **WIDE[shape]), lazy=True)[0]
    before = mx.get_active_memory()
    figures = [
        prefill_bytes(model, 128, 2048),
        batch_prefill_bytes(model, 4, 128),
        decode_bytes(model, 8, 2048),
    ]
    assert mx.get_active_memory() - before < 4096
    assert all(figure > 0 for figure in figures)
    logits = model(mx.zeros((1, 3), dtype=mx.int32))
    assert bool(mx.all(mx.isfinite(logits)).item())


def test_a_longer_context_takes_more_memory(model_dir: Build) -> None:
    model: Any = load_model(model_dir(), lazy=True)[0]
    assert prefill_bytes(model, 128, 2048) > 2 * prefill_bytes(model, 128, 512)


def test_rows_sample_one_by_one_from_a_large_vocabulary(
    model_dir: Build,
) -> None:
    model: Any = load_model(model_dir("qwen3", vocab_size=151_936), lazy=True)[0]
    logits = 32 * 151_936 * 4
    assert decode_bytes(model, 32, 64) < 5 * logits
