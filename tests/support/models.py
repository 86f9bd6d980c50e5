"""Small models of common architectures: real files with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512

_TEXT = """The quick brown fox jumps over the lazy dog. def main(argv: list[str]) -> int:
    return 0  # naïve café, 日本語のテキスト, emoji 😀🎉👩‍🔬, Ελληνικά, עברית, combining e\u0301
"""

_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON},
    "qwen3": {"model_type": "qwen3", **_COMMON},
    "gemma3": {
        "model_type": "gemma3_text",
        **_COMMON,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
    },
    # Recurrent state only.
    "mamba2": {
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 64,
        "state_size": 16,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.001, 0.1],
        "time_step_rank": 4,
        "max_position_embeddings": 2048,
    },
    # The recurrent layers treat padding as text.
    "mamba": {
        "model_type": "mamba",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "max_position_embeddings": 2048,
    },
    # Short convolutions alternate with full attention.
    "lfm2": {
        "model_type": "lfm2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 128,
        "rope_theta": 10000.0,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
}


def build_tokenizer(path: Path) -> None:
    """Write a byte-level BPE tokenizer covering every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<eos>", "<user>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def build_model(
    path: Path,
    shape: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    quantize_bits: int | None = None,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a model directory and return the path.

    Args:
        path: Directory, created if missing.
        shape: A key of ``CONFIGS``.
        seed: Seed of the random weights.
        dtype: Dtype of the stored weights.
        quantize_bits: Bits per weight of a quantized model; None does not quantize.
        shards: Number of safetensors files.
        overrides: Changes to the configuration.
    """
    import mlx.core as mx
    from mlx.nn.layers.base import Module
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes, quantize_model

    path.mkdir(parents=True, exist_ok=True)
    config = {**CONFIGS[shape], "eos_token_id": 0, **overrides}
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model: Module = model_class(args_class.from_dict(config))
    # Scaled up from the initialization, so that the most likely token is clear.
    model.update(tree_map(lambda p: p * 3 if p.ndim > 1 else p, model.parameters()))
    model.set_dtype(getattr(mx, dtype))
    if quantize_bits:
        model, config = quantize_model(model, config, group_size=32, bits=quantize_bits)
    weights = dict(tree_flatten(model.parameters()))
    _save(path, weights, shards)
    (path / "config.json").write_text(json.dumps(config))
    build_tokenizer(path)
    return path


def _save(path: Path, weights: dict[str, Any], shards: int) -> None:
    import mlx.core as mx

    names = sorted(weights)
    index: dict[str, str] = {}
    for i in range(shards):
        name = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        )
        part = {key: weights[key] for key in names[i::shards]}
        mx.save_safetensors(str(path / name), part, metadata={"format": "mlx"})
        index |= dict.fromkeys(part, name)
    if shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (path / "model.safetensors.index.json").write_text(text)
