"""Rows of ``make memory``: models and the settings they are hosted with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tools.memory.catalog import CONFIGS
from tools.memory.measure import Setting


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: Label of the row.
        model_type: Model type in the catalog.
        sizes: Settings that override those of the catalog.
        stored_dtype: Dtype of the stored weights.
        bits: Bits of a quantized model; None if not quantized.
        setting: Settings the model is hosted with.
    """

    name: str
    model_type: str
    setting: Setting
    sizes: dict[str, Any] = field(default_factory=dict)
    stored_dtype: str = "float32"
    bits: int | None = None


_LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_MUCH_KV = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
}


def shaped() -> Iterator[Row]:
    """Yield models shaped like common ones, a hundred times smaller."""
    llama, name = _LLAMA, "Llama-shaped, 98 MiB"
    for parallel in (1, 8, 32):
        yield Row(name, "llama", Setting(parallel=parallel), llama)
    yield Row(name, "llama", Setting(parallel=8, context_length=2048), llama)
    yield Row(f"{name}, prefix cache", "llama", Setting(prefix_cache_bytes=None), llama)
    for bits in (4, 8):
        yield Row(f"{name}, {bits}-bit", "llama", Setting(), llama, "bfloat16", bits)
        # Slow on a CPU.
        short = Setting(dtype="as_stored", parallel=4, context_length=64)
        yield Row(f"{name}, {bits}-bit as stored", "llama", short, llama, "bfloat16", bits)
    short = Setting(dtype="as_stored", context_length=128)
    yield Row(f"{name}, bf16 as stored", "llama", short, llama, "bfloat16")
    for parallel in (1, 32):
        sizes = {"vocab_size": 151_936}
        yield Row("qwen3, vocabulary 151,936", "qwen3", Setting(parallel=parallel), sizes)
    yield Row("sliding window (gemma3)", "gemma3_text", Setting(parallel=32))
    yield Row("latent attention (deepseek_v3)", "deepseek_v3", Setting(parallel=32))
    yield Row("experts (qwen3_moe)", "qwen3_moe", Setting(parallel=32))
    yield Row("hybrid (granitemoehybrid)", "granitemoehybrid", Setting(parallel=32))
    yield Row("state space (mamba2)", "mamba2", Setting(parallel=32))
    yield Row("NumPy in the model's code (plamo)", "plamo", Setting(), {}, "bfloat16")
    kv = "much KV per token"
    yield Row(kv, "llama", Setting(parallel=24, context_length=1024), _MUCH_KV)
    cached = Setting(parallel=8, context_length=1024, prefix_cache_bytes=None)
    yield Row(f"{kv}, prefix cache", "llama", cached, _MUCH_KV)
    for bits in (8, 4):
        # Slow on a CPU, for which the context is shorter than above.
        quantized = replace(cached, context_length=512, kv_bits=bits)
        yield Row(f"{kv}, {bits}-bit KV cache", "llama", quantized, _MUCH_KV)
    yield Row("8-bit KV cache (gemma3)", "gemma3_text", Setting(parallel=32, kv_bits=8))


def quick() -> Iterator[Row]:
    """Yield the subset for CI, which takes minutes even without a fast BLAS."""
    chosen = {
        *("Llama-shaped, 98 MiB, prefix cache", "Llama-shaped, 98 MiB, 4-bit as stored"),
        *("sliding window (gemma3)", "latent attention (deepseek_v3)", "experts (qwen3_moe)"),
        *("hybrid (granitemoehybrid)", "state space (mamba2)"),
        "NumPy in the model's code (plamo)",
        *("much KV per token, prefix cache", "much KV per token, 4-bit KV cache"),
    }
    yield from (row for row in shaped() if row.name in chosen)


def all_types(parallels: tuple[int, ...] = (1, 8, 32)) -> Iterator[Row]:
    """Yield tiny models of every type in mlx_lm."""
    for model_type in CONFIGS:
        for parallel in parallels:
            yield Row(model_type, model_type, Setting(parallel=parallel))


def all_formats() -> Iterator[Row]:
    """Yield tiny models of every type in formats other than float32."""
    for model_type in CONFIGS:
        stored = Setting(dtype="as_stored", parallel=8)
        yield Row(f"{model_type}, bf16", model_type, Setting(parallel=8), {}, "bfloat16")
        yield Row(f"{model_type}, bf16 as stored", model_type, stored, {}, "bfloat16")
        yield Row(f"{model_type}, 4-bit", model_type, Setting(parallel=8), {}, "float32", 4)
        yield Row(f"{model_type}, 4-bit as stored", model_type, stored, {}, "float32", 4)
        yield Row(f"{model_type}, 8-bit as stored", model_type, stored, {}, "float32", 8)
