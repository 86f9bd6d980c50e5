"""Tiny configurations of types with attention and plain feed-forward layers."""

from __future__ import annotations

from tools.memory.catalog_base import (
    ALTERNATING,
    BASE,
    DEFAULT_ROPE,
    MLA,
    ROPE_BY_LAYER_TYPE,
    WINDOW,
    YARN,
    Config,
    with_base,
)

_LLAMA3_ROPE: Config = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}

_GRANITE: Config = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.0625,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}

_MINICPM: Config = {
    "dim_model_base": 64,
    "scale_depth": 1.4,
    "scale_emb": 12.0,
    # With a tied head, loading minicpm adds a head that the model does not have.
    "tie_word_embeddings": False,
}

# With a tied head these types multiply by the packed weights of quantized embeddings.
_UNTIED_HEAD: Config = {"tie_word_embeddings": False}

_PATTERN_OF_FOUR: Config = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 4,
}

_SHARED_KV_LAYERS: Config = {
    **ALTERNATING,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 256,
    "final_logit_softcapping": 30.0,
}

GEMMA3_TEXT: Config = {
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 10000.0,
}

GEMMA3N_TEXT: Config = {
    **_SHARED_KV_LAYERS,
    "rope_local_base_freq": 10000.0,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 64,
}

GEMMA4_TEXT: Config = {**_SHARED_KV_LAYERS, "global_head_dim": 64, "use_double_wide_mlp": True}

MINISTRAL3: Config = {**ALTERNATING, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}

_USUAL_NAMES: dict[str, Config] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "use_qk_norm": True},
    "cohere2": {**_PATTERN_OF_FOUR, "layer_norm_eps": 1e-5, "logit_scale": 0.0625},
    "ernie4_5": {"use_bias": False},
    "exaone4": {
        **_PATTERN_OF_FOUR,
        "sliding_window_pattern": "LLLG",
        "rope_scaling": _LLAMA3_ROPE,
    },
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32.0},
    "gemma3_text": GEMMA3_TEXT,
    "gemma4_text": GEMMA4_TEXT,
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "gpt_neox": {
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "num_key_value_heads": 4,
    },
    "granite": {**_GRANITE, "mlp_bias": False},
    "helium": {"mlp_bias": False},
    "hunyuan_v1_dense": {
        "use_qk_norm": True,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "internlm2": {"bias": False},
    "internlm3": {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "llama": {},
    "llama4_text": {
        **_UNTIED_HEAD,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 256,
        "no_rope_layers": [1, 1, 1, 0],
        "use_qk_norm": True,
    },
    "mimo": {},
    "minicpm": _MINICPM,
    "minicpm3": {
        **MLA,
        **_MINICPM,
        "rope_scaling": {
            "type": "longrope",
            # mlx_lm always uses the long factors; this runner selects by sequence length.
            "short_factor": [2.0] * 16,
            "long_factor": [2.0] * 16,
            "original_max_position_embeddings": 1024,
        },
    },
    "ministral3": MINISTRAL3,
    "mistral": ALTERNATING,
    "muse_glimmer": {**ALTERNATING, "rope_parameters": DEFAULT_ROPE},
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
    "nemotron-nas": {
        "num_hidden_layers": 4,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 3.0}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.5}},
        ],
    },
    "olmo2": {},
    "olmo3": ALTERNATING,
    "phi": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "phi3": {"original_max_position_embeddings": 4096},
    # The type masks the logits of tokens 100256 to 100351, whatever the vocabulary size.
    "phi3small": {
        "num_hidden_layers": 4,
        "vocab_size": 100352,
        "hidden_size": 64,
        "ff_intermediate_size": 128,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 4,
    },
    "plamo": {"n_shared_head": 2},
    "plamo3": {**_PATTERN_OF_FOUR, "rope_local_theta": 10000},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {**_UNTIED_HEAD, "attention_bias": True},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "spark2_5": {**ALTERNATING, "rope_parameters": ROPE_BY_LAYER_TYPE},
    "stablelm": {
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": True,
        "use_qkv_bias": True,
    },
    "starcoder2": {"norm_epsilon": 1e-5},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": MLA,
}

_GPT2: Config = {
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 4096,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 256,
}

_OWN_NAMES: dict[str, Config] = {
    "afm7": {
        "vocab_size": 256,
        "hidden_dim": 128,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 2.0,
        "rope_theta": 10000.0,
    },
    "exaone": {
        **{name: value for name, value in BASE.items() if name != "num_hidden_layers"},
        "num_layers": 2,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt2": {**_GPT2, "n_ctx": 4096},
    "gpt_bigcode": {**_GPT2, "n_inner": 256, "multi_query": True},
    "gptj": {**_GPT2, "rotary_dim": 16},
    "lille-130m": {
        "block_size": 4096,
        "layer_norm_eps": 1e-5,
        "n_embd": 128,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 2,
        "rope_theta": 10000.0,
        "vocab_size": 256,
    },
    "qwen": {
        "vocab_size": 256,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "kv_channels": 32,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-6,
        "intermediate_size": 256,
    },
    "openelm": {
        "head_dim": 32,
        "num_transformer_layers": 2,
        "model_dim": 128,
        "vocab_size": 256,
        "ffn_dim_divisor": 64,
        "num_query_heads": [4, 8],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
}

DENSE: dict[str, Config] = {**with_base(_USUAL_NAMES), **with_base(_OWN_NAMES, {})}
