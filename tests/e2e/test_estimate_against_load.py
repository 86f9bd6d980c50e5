"""The estimate against the memory of real loads: weights, transients and KV cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from runner_client.memory.estimation import estimate
from runner_client.types import Dtype as ClientDtype
from runner_common.model_directory import read_model_directory
from support.sweeps import diagonal

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

from runner_server.engine.types import Dtype, LoadSpec  # noqa: E402 - after importorskip
from runner_server.mlx_backend.loading.loader import load  # noqa: E402
from runner_server.mlx_backend.planning.measure import load_transient_bytes  # noqa: E402
from runner_server.mlx_backend.upstream.lean_import import import_lean  # noqa: E402

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3": {"sliding_window": 128, "sliding_window_pattern": 2},
}
CONTEXT = 300
MIB = 1024**2

ModelDir = Callable[..., Path]


def active_bytes() -> int:
    gc.collect()
    mx.clear_cache()
    return int(mx.get_active_memory())


@pytest.mark.parametrize(
    ("dtype", "shape", "bits"),
    diagonal(["as_stored", "float32", "bfloat16"], [*SHAPES], [None, 4, 8]),
)
def test_the_estimate_covers_weights_and_peak(
    model_dir: ModelDir, shape: str, bits: int | None, dtype: ClientDtype
) -> None:
    path = model_dir(shape, dtype="bfloat16", quantize_bits=bits, **SIZES, **SHAPES[shape])
    need = estimate(str(path), context_length=256, parallel=1, dtype=dtype)
    before = active_bytes()
    spec = LoadSpec(str(path), context_length=256, parallel=1, dtype=Dtype(dtype))
    model = load(spec, lambda _progress: None)
    grown = active_bytes() - before
    assert model.info.weight_bytes == pytest.approx(need.weight_bytes, rel=0.01)
    assert grown == pytest.approx(need.weight_bytes, rel=0.03)
    # The peak includes one warm-up completion, so it covers every part of the need.
    peak = mx.get_peak_memory() - before
    assert grown <= peak <= need.total_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_covers_the_transient_of_a_conversion(model_dir: ModelDir, shape: str) -> None:
    path = model_dir(shape, dtype="bfloat16", **SIZES, **SHAPES[shape])
    need = estimate(str(path), dtype="float32", parallel=1)
    before = active_bytes()
    spec = LoadSpec(str(path), context_length=256, parallel=1, dtype=Dtype.FLOAT32)
    model = load(spec, lambda _progress: None)
    peak = mx.get_peak_memory() - before
    assert model.info.weight_bytes == need.weight_bytes
    # The rest belongs to the warm-up: the activations and KV cache of one token.
    kv_bytes = estimate(str(path), dtype="float32", context_length=2, parallel=1).kv_bytes
    transient = load_transient_bytes(model._model, read_model_directory(path))
    assert peak - need.weight_bytes <= transient + kv_bytes + MIB
    # The estimate adds the part of it that later allocations do not cover.
    assert transient <= need.need.mlx_bytes - need.weight_bytes + need.load_transient_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_matches_the_kv_cache_of_a_full_context(
    model_dir: ModelDir, shape: str
) -> None:
    path = model_dir(shape, dtype="float32", **SIZES, **SHAPES[shape])
    need = estimate(str(path), dtype="float32", context_length=CONTEXT, parallel=1)
    spec = LoadSpec(str(path), context_length=CONTEXT, parallel=1, dtype=Dtype.FLOAT32)
    model = load(spec, lambda _progress: None)
    caches = import_lean("mlx_lm.models.cache").make_prompt_cache(model._model)
    before = active_bytes()
    mx.eval(model._model(mx.zeros((1, CONTEXT - 2), dtype=mx.int32), cache=caches))
    for _ in range(2):  # a rotating cache reaches its final size in decode
        mx.eval(model._model(mx.zeros((1, 1), dtype=mx.int32), cache=caches))
    held = sum(cache.nbytes for cache in caches)
    if shape == "gemma3":
        # A window takes in a prompt chunk before it drops the oldest tokens.
        assert held <= need.kv_bytes <= 1.25 * held
    else:
        assert held == need.kv_bytes
    assert active_bytes() - before == pytest.approx(held, rel=0.02)


def test_client_and_server_have_the_same_dtypes() -> None:
    assert set(get_args(ClientDtype)) == {dtype.value for dtype in Dtype}
