"""Tiny configurations of types with attention and mixtures of experts."""

from __future__ import annotations

from tools.memory.catalog_base import (
    ALTERNATING,
    BASE,
    DEFAULT_ROPE,
    GROUPED,
    MLA,
    MOE,
    ROPE_BY_LAYER_TYPE,
    WINDOW,
    YARN,
    Config,
    with_base,
)

_DEEPSEEK: Config = {**MLA, **GROUPED, "rope_scaling": YARN}

DEEPSEEK_V3: Config = {**BASE, **MOE, **_DEEPSEEK}

_INDEXER: Config = {"index_head_dim": 64, "index_n_heads": 4, "index_topk": WINDOW}

_HALF_ROTARY: Config = {"partial_rotary_factor": 0.5, "rope_scaling": None}

MISTRAL4: Config = {**MLA, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}

_LAYERS_AFTER_DENSE: Config = {"mlp_only_layers": [0], "decoder_sparse_step": 1}

QWEN3_MOE: Config = {**BASE, **MOE, **_LAYERS_AFTER_DENSE}

_LONGCAT: Config = {
    **MLA,
    "zero_expert_type": "identity",
    "ffn_hidden_size": 256,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 128,
    "zero_expert_num": 2,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

_USUAL_NAMES: dict[str, Config] = {
    "Klear": _LAYERS_AFTER_DENSE,
    "afmoe": {**ALTERNATING, "num_dense_layers": 1, "mup_enabled": True},
    "bailing_moe": {"use_qk_norm": True},
    "deepseek": {},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, **_INDEXER},
    # One layer has only the window, two create compressed entries and three select among them;
    # the others read those of an earlier layer.
    "deepseek_v41": {
        "num_hidden_layers": 5,
        "head_dim": 64,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 64,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": WINDOW,
        "compress_ratios": [0, 1, 4, 4, 4],
        "kv_source_layer_ids": [1, 2],
        "index_source_layer_ids": [1, 2, 3],
        "candidate_source_layer_id": 2,
        "candidate_topk_blocks": 4,
        "candidate_block_size": 8,
        "index_n_heads": 4,
        "index_head_dim": 64,
        "index_topk": 16,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 4,
    },
    "dots1": {},
    "ernie4_5_moe": {
        "use_bias": False,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**ALTERNATING, "is_moe_layer": [False, True, True, True]},
    "glm4_moe": {**_HALF_ROTARY, "use_qk_norm": True},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": {**MLA, **_INDEXER, "rope_parameters": DEFAULT_ROPE},
    "gpt_oss": {**ALTERNATING, "rope_scaling": YARN},
    "granitemoe": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.0625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
    },
    "hunyuan": {
        "num_hidden_layers": 4,
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "laguna": {
        **ALTERNATING,
        "rope_parameters": ROPE_BY_LAYER_TYPE,
        "num_attention_heads_per_layer": [8, 4, 8, 4],
        "shared_expert_intermediate_size": 128,
    },
    "longcat_flash": {**_LONGCAT, "attention_method": "MLA"},
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 1,
    },
    "mellum": {**ALTERNATING, "rope_parameters": ROPE_BY_LAYER_TYPE},
    "mimo_v2_flash": {
        "num_hidden_layers": 4,
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "v_head_dim": 16,
        "swa_head_dim": 32,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.5,
    },
    "minimax": {"shared_intermediate_size": 128, "rotary_dim": 16},
    "mistral4": MISTRAL4,
    "mixtral": {},
    "olmoe": {},
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            # mlx_lm always uses the long factors; this runner selects by sequence length.
            "short_factor": [2.0] * 16,
            "long_factor": [2.0] * 16,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        },
    },
    "qwen2_moe": {"shared_expert_intermediate_size": 128},
    "qwen3_moe": _LAYERS_AFTER_DENSE,
    "solar_open": _HALF_ROTARY,
    "step3p5": {
        **ALTERNATING,
        "num_attention_groups": 2,
        "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 2},
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 128,
        "swiglu_limits": [0.0, 0.0, 7.0, 7.0],
        "swiglu_limits_shared": [0.0, 0.0, 0.0, 16.0],
    },
}

_OWN_NAMES: dict[str, Config] = {
    "dbrx": {
        "vocab_size": 256,
        "d_model": 128,
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "phixtral": {
        "num_vocab": 256,
        "model_dim": 128,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}

MIXTURES: dict[str, Config] = {
    **with_base(_USUAL_NAMES, {**BASE, **MOE}),
    **with_base(_OWN_NAMES, {}),
}
