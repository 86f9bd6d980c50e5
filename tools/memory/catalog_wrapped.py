"""Tiny configurations of types that keep the language model's settings in ``text_config``."""

from __future__ import annotations

from tools.memory.catalog_base import ALTERNATING, BASE, MOE, WINDOW, Config
from tools.memory.catalog_dense import GEMMA3_TEXT, GEMMA3N_TEXT, GEMMA4_TEXT, MINISTRAL3
from tools.memory.catalog_hybrid import KIMI_K3_TEXT, LFM2, QWEN3_5_EXPERTS, QWEN3_5_TEXT
from tools.memory.catalog_moe import DEEPSEEK_V3, MIXTURES, QWEN3_MOE

_UNTIED: Config = {**BASE, "tie_word_embeddings": False}

_LLAMA4_TEXT: Config = {
    **BASE,
    **MOE,
    "model_type": "llama4_text",
    "num_hidden_layers": 4,
    "attention_chunk_size": WINDOW,
    "interleave_moe_layer_step": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 256,
    "rope_scaling": None,
    "use_qk_norm": True,
}

_MINIMAX_M3_TEXT: Config = {
    **BASE,
    **MOE,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "dense_intermediate_size": 256,
    "shared_intermediate_size": 128,
    "moe_layer_freq": [0, 1, 1, 1],
    "sparse_attention_config": {
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 64,
        "sparse_block_size": 16,
        "sparse_topk_blocks": 4,
        "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1, 1],
    },
}

_GEMMA4_EXPERTS: Config = {
    **BASE,
    "model_type": "gemma4_text",
    **ALTERNATING,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 128,
}

_PACKED_MODULES: list[Config] = [
    {"path": path, "embedding": embedding, "dtype": "float16", "block": block}
    for path, embedding, block in (
        ("model.embed_tokens", True, 0),
        ("model.layers.0.mlp.down_proj", False, 512),
        ("model.layers.3.self_attn.q_proj", False, 0),
        ("lm_head", False, 0),
    )
]

_TEXTS: dict[str, Config] = {
    "deepseek_v41_text": MIXTURES["deepseek_v41"],
    "gemma3n": {**BASE, **GEMMA3N_TEXT, "model_type": "gemma3n_text"},
    "kimi_k25": {**DEEPSEEK_V3, "model_type": "kimi_k2"},
    "kimi_k3": {**KIMI_K3_TEXT, "model_type": "kimi_linear"},
    "kimi_vl": {**DEEPSEEK_V3, "model_type": "deepseek_v3"},
    "lfm2-vl": {**BASE, **LFM2, "model_type": "lfm2"},
    "llama4": _LLAMA4_TEXT,
    "llava": {**_UNTIED, "model_type": "llama"},
    "minimax_m3_vl": _MINIMAX_M3_TEXT,
    "mistral3": {**_UNTIED, **MINISTRAL3, "model_type": "ministral3"},
    "pixtral": {**_UNTIED, "model_type": "mistral"},
    "qwen2_vl": {**_UNTIED, "model_type": "qwen2"},
    "qwen2_5_vl": {**_UNTIED, "model_type": "qwen2"},
    "qwen3_5": {**QWEN3_5_TEXT, "model_type": "qwen3_5_text"},
    "qwen3_5_moe": {**QWEN3_5_TEXT, **QWEN3_5_EXPERTS, "model_type": "qwen3_5_moe_text"},
    "qwen3_vl": {**_UNTIED, "model_type": "qwen3"},
    "qwen3_vl_moe": {**QWEN3_MOE, "model_type": "qwen3_moe"},
}

# For these types, settings outside `text_config` matter too.
_WITH_MORE: dict[str, Config] = {
    "gemma3": {
        "vocab_size": 256,
        "text_config": {**BASE, **GEMMA3_TEXT, "model_type": "gemma3_text"},
    },
    "gemma4": {"vocab_size": 256, "text_config": _GEMMA4_EXPERTS},
    "gemma4_unified": {
        "vocab_size": 256,
        "text_config": {**BASE, **GEMMA4_TEXT, "model_type": "gemma4_text"},
    },
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": _PACKED_MODULES,
        "text_config": {**QWEN3_5_TEXT, "intermediate_size": 512},
    },
}

WRAPPED: dict[str, Config] = {
    **{name: {"model_type": name, "text_config": text} for name, text in _TEXTS.items()},
    **{name: {"model_type": name, **config} for name, config in _WITH_MORE.items()},
}
