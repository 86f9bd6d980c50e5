"""Tiny configurations of types with recurrent or convolution layers."""

from __future__ import annotations

from tools.memory.catalog_base import (
    BASE,
    GROUPED,
    LINEAR_ATTENTION,
    MLA,
    MOE,
    WINDOW,
    Config,
    with_base,
)

_BAILING: Config = {
    **MOE,
    **GROUPED,
    "num_hidden_layers": 4,
    "layer_group_size": 2,
    "group_norm_size": 2,
}

_KIMI_LINEAR_ATTENTION: Config = {
    "num_heads": 2,
    "head_dim": 64,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 2, 3],
    "full_attn_layers": [4],
}

_KIMI: Config = {
    **MOE,
    **MLA,
    "num_hidden_layers": 4,
    "num_experts_per_token": 2,
    "linear_attn_config": _KIMI_LINEAR_ATTENTION,
}

KIMI_K3_TEXT: Config = {
    **BASE,
    **_KIMI,
    "hidden_act": "situ",
    "linear_attn_config": {**_KIMI_LINEAR_ATTENTION, "gate_lower_bound": -5.0},
    "attn_res_block_size": 2,
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "routed_expert_hidden_size": 64,
    "latent_moe_use_norm": True,
}

_LFM2: Config = {
    "num_hidden_layers": 4,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention"] * 2,
}

LFM2: Config = {
    **_LFM2,
    "block_dim": 128,
    "block_ff_dim": 256,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}

QWEN3_5_TEXT: Config = {
    **BASE,
    **LINEAR_ATTENTION,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "tie_word_embeddings": False,
    # mlx_lm ignores a top-level ``rope_theta`` for these types; this runner reads it.
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 2],
    },
}

QWEN3_5_EXPERTS: Config = {**MOE, "shared_expert_intermediate_size": 128}

_USUAL_NAMES: dict[str, Config] = {
    # With a tied head, the type calls a head that does not exist.
    "baichuan_m1": {
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "sliding_window_layers": [1, 3],
        "conv_window": 2,
        "num_swa_attention_heads": 4,
        "num_swa_key_value_heads": 4,
    },
    "bailing_hybrid": {**_BAILING, **MLA},
    "bailing_moe_linear": {**_BAILING, "use_qk_norm": True},
    # Checkpoints of v3 have the type `bailing_hybrid`, and are recognized by `architectures`.
    "bailing_moe_v3": {
        **_BAILING,
        **MLA,
        "model_type": "bailing_hybrid",
        "architectures": ["BailingMoeV3ForCausalLM"],
        "moe_shared_expert_intermediate_size": 128,
    },
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_rms_norm": True,
    },
    "gear": {
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"],
        "attn_logit_softcapping": 50.0,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0625,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "jamba": {
        **MOE,
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 2,
        "expert_layer_period": 3,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_dt_rank": 64,
    },
    "kimi_linear": {**_KIMI, "model_max_length": 4096},
    "lfm2": LFM2,
    "lfm2_moe": {**_LFM2, **MOE, "num_dense_layers": 1, "use_expert_bias": True},
    "nemotron_h": {
        **MOE,
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "moe_shared_expert_intermediate_size": 128,
        "moe_latent_size": 64,
    },
    "olmo_hybrid": {
        **LINEAR_ATTENTION,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 4,
        "linear_allow_neg_eigval": True,
    },
    "plamo2": {
        "num_hidden_layers": 4,
        "hidden_size_per_head": 32,
        "attention_window_size": WINDOW,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_num_heads": 4,
        "mamba_step": 2,
    },
    "qwen3_next": {
        **QWEN3_5_TEXT,
        **MOE,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "partial_rotary_factor": 0.25,
        "shared_expert_intermediate_size": 128,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": WINDOW,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
    },
}

_STATE_SPACE: Config = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "state_size": 16,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 64,
    "max_position_embeddings": 4096,
}

_OWN_NAMES: dict[str, Config] = {
    "falcon_mamba": _STATE_SPACE,
    "mamba": _STATE_SPACE,
    "mamba2": {
        **_STATE_SPACE,
        "num_heads": 4,
        "head_dim": 32,
        "layer_norm_epsilon": 1e-5,
        "n_groups": 1,
        "tie_word_embeddings": True,
        "time_step_limit": [0.001, 0.1],
    },
    "rwkv7": {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "norm_eps": 1e-5,
        "head_dim": 32,
        "num_hidden_layers": 2,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 64,
        "gate_low_rank_dim": 64,
        "decay_low_rank_dim": 64,
    },
}

HYBRIDS: dict[str, Config] = {**with_base(_USUAL_NAMES), **with_base(_OWN_NAMES, {})}
