"""Benchmark models, written once into the cache.

Every contender reads the same files. Weights are stored as float32 because the peers keep the
stored dtype, and float32 is the fastest dtype on a CPU for all of them. The 4-bit model is stored
as ``mlx_lm.convert`` writes it, with bfloat16 scales. The end-of-text id is one past the
vocabulary, so no model can stop early and every contender generates exactly the requested number
of tokens. Models for constraints have a reachable one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.paths import CACHE, DEMO_MODEL
from bench.vocabulary import EOS, write_tokenizer

LARGE_VOCABULARY = 151_936
SMALL_VOCABULARY = 4_096

_MARK = "complete"
"""Marker file, written last; a directory without it is incomplete."""


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        config: Contents of config.json except for the settings common to all shapes.
        vocab_size: Number of token ids.
        quantized: Store the weights in 4 bits.
        ends: The last token id ends a text, without which a text cannot be constrained.
    """

    config: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = SMALL_VOCABULARY
    quantized: bool = False
    ends: bool = False


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True}
_TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 16_384,
}
_LARGE = {
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
_GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 64,
    "sliding_window": 128,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 10000.0,
}

DEMO = "demo"
DEMO_WIDE = "demo-58m"
"""The demo model with zeros around its weights: the same text in the time of a larger model. With
the demo model as its draft model, every guess is right but for rounding."""

DEMO_RANDOM = "demo-random"
"""A model of the demo's shape and tokens with random weights, whose guesses are wrong."""

_WIDE = {"intermediate_size": 8192, "num_hidden_layers": 12}

SHAPES = {
    "llama-1m": Shape({"model_type": "llama", **_TINY}),
    "qwen3-20m": Shape(
        {"model_type": "qwen3", **_TINY, "num_hidden_layers": 2}, vocab_size=LARGE_VOCABULARY
    ),
    "gemma3-7m": Shape(_GEMMA),
    "llama-100m": Shape(_LARGE, vocab_size=32_768),
    "llama-100m-4bit": Shape(_LARGE, vocab_size=32_768, quantized=True),
}

_QWEN3_600M = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
"""The shape of Qwen3-0.6B, the smallest model of its family, which has the large vocabulary."""

_POOLED = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    # With tied weights, random models repeat the last token: each would give the same answers.
    "tie_word_embeddings": False,
}
POOLED_LAYERS = {"pool-20": 4, "pool-30": 7, "pool-40": 10, "pool-50": 13, "pool-60": 16}
POOLED_SHAPES = {
    name: Shape({**_POOLED, "num_hidden_layers": layers}) for name, layers in POOLED_LAYERS.items()
}
"""Models for pools, named by the MiB of their weights: large enough to be seen in the memory of a
process, and small enough to load in a second."""

ENDING = {
    "llama-1m-ending": replace(SHAPES["llama-1m"], ends=True),
    "qwen3-20m-ending": replace(SHAPES["qwen3-20m"], ends=True),
    "qwen3-600m-ending": Shape(_QWEN3_600M, vocab_size=LARGE_VOCABULARY, ends=True),
}
"""Models for constraints: two whose steps take so little that constraints cost most, and one of a
size that is in use."""

FEW_STREAMS = {"qwen3-600m-ending": 16}
"""Most streams of models whose KV caches would not fit the machine with as many as the others."""

LONG = "llama-1m-32k"
"""Model for long prompts: ``llama-1m`` with a context of 32,768 tokens."""

_LONG_SHAPE = Shape({"model_type": "llama", **_TINY, "max_position_embeddings": 32_768})

SIZES = {
    "llama-400m": Shape(
        {
            **_LARGE,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        vocab_size=32_768,
    ),
    "llama-1b": Shape(
        {
            **_LARGE,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        vocab_size=32_768,
    ),
}
"""Models that only the machine's limits are compared with: steps take up to half a second."""

_RANDOM = {**SHAPES, **POOLED_SHAPES, **ENDING, LONG: _LONG_SHAPE, **SIZES}


def ensure_model(name: str) -> Path:
    """Return the directory of a model, writing the files first if needed.

    The files are written by a subprocess, to keep MLX out of the load generator's process.

    Raises:
        subprocess.CalledProcessError: The model cannot be written.
    """
    path = CACHE / "models" / name
    if not (path / _MARK).exists():
        shutil.rmtree(path, ignore_errors=True)
        command = [sys.executable, "-m", "bench.models", name, str(path)]
        subprocess.run(command, check=True)
    return path


def context_length(path: Path) -> int:
    """Return the maximum sequence length of a model, in tokens."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])


def _write(name: str, path: Path) -> None:
    path.mkdir(parents=True)
    if name in (DEMO, DEMO_WIDE, DEMO_RANDOM):
        _write_demo(path, name)
    else:
        _write_random(_RANDOM[name], path)
    (path / _MARK).touch()


def _write_random(shape: Shape, path: Path) -> None:
    import mlx.core as mx
    from mlx.nn.layers.base import Module
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes, quantize_model

    config = {
        **_COMMON,
        **shape.config,
        "vocab_size": shape.vocab_size,
        "eos_token_id": shape.vocab_size - shape.ends,
    }
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model: Module = model_class(args_class.from_dict(config))
    if shape.quantized:
        model.set_dtype(mx.bfloat16)
        model, config = quantize_model(model, config, group_size=64, bits=4)
    else:
        model.set_dtype(mx.float32)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(path, shape.vocab_size)


def _write_demo(path: Path, name: str) -> None:
    """Write the demo model or a variant in float32 with an unreachable end-of-text id."""
    import mlx.core as mx

    weights = mx.load(str(DEMO_MODEL / "model.safetensors"))
    if not isinstance(weights, dict):
        raise TypeError("the demo model's weights are not a safetensors file")
    weights = {key: value.astype(mx.float32) for key, value in weights.items()}
    if name == DEMO_WIDE:
        weights = _widened(weights)
    elif name == DEMO_RANDOM:
        mx.random.seed(0)
        weights = {
            key: 0.05 * mx.random.normal(value.shape) if value.ndim > 1 else value
            for key, value in weights.items()
        }
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    vocab_size = config["vocab_size"]
    config |= {"eos_token_id": vocab_size, "torch_dtype": "float32"}
    config |= _WIDE if name == DEMO_WIDE else {}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | EOS | {"id": vocab_size})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["eos_token"] = EOS["content"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _widened(weights: dict[str, Any]) -> dict[str, Any]:
    """Return weights with zeros for more columns of each MLP, and for more layers."""
    import mlx.core as mx

    def padded(key: str, value: mx.array) -> mx.array:
        more = _WIDE["intermediate_size"] - value.shape[int("down_proj" in key)]
        return mx.pad(value, [(0, 0), (0, more)] if "down_proj" in key else [(0, more), (0, 0)])

    found = {key: padded(key, value) if ".mlp." in key else value for key, value in weights.items()}
    first = {key: value for key, value in found.items() if key.startswith("model.layers.0.")}
    layer = sum(key.endswith(".mlp.down_proj.weight") for key in found)
    for index in range(layer, _WIDE["num_hidden_layers"]):
        for key, value in first.items():
            own = key.replace("layers.0.", f"layers.{index}.")
            found[own] = value if value.ndim == 1 else mx.zeros_like(value)
    return found


def main() -> int:
    """Write one model."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("name", choices=[DEMO, DEMO_WIDE, DEMO_RANDOM, *_RANDOM])
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    _write(arguments.name, arguments.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
