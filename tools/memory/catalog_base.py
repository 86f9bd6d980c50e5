"""Settings shared by the tiny models of the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]

# Every width that is quantized is a multiple of 64, the size of a quantization group.
BASE: Config = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}

# The same numbers under each name that some type reads.
MOE: Config = {
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
}

GROUPED: Config = {"n_group": 2, "topk_group": 1}
"""Settings of experts selected by group first."""

MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}

WINDOW = 64
"""Window of a sliding layer in tokens, several times shorter than a prompt of a few hundred."""

ALTERNATING: Config = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

YARN: Config = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

DEFAULT_ROPE: Config = {"rope_type": "default", "rope_theta": 10000.0}

ROPE_BY_LAYER_TYPE: Config = {
    "sliding_attention": DEFAULT_ROPE,
    "full_attention": {**YARN, "partial_rotary_factor": 0.5},
}

LINEAR_ATTENTION: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}


def with_base(own: Mapping[str, Config], base: Config = BASE) -> dict[str, Config]:
    """Complete the settings of several types.

    Args:
        own: Settings that each type adds or changes, by type.
        base: Settings common to the types.

    Returns:
        Complete configurations by type; an entry may override ``model_type``.
    """
    return {name: {"model_type": name, **base, **settings} for name, settings in own.items()}
