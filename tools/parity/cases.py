"""Models to save with transformers: types, and settings that change the numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model to save.

    Attributes:
        type: ``model_type`` of the model.
        variant: Name of the variant; empty for the default settings.
        changes: Settings that differ from the defaults.
    """

    type: str
    variant: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the folder and of the row in the table."""
        return f"{self.type}-{self.variant}" if self.variant else self.type


_ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn-factor": {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "linear": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 4.0},
}

_TYPES = (
    *("apertus", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_h1", "gemma"),
    *("gemma2", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_oss", "granite"),
    *("granitemoe", "helium", "llama", "llama4_text", "mamba", "minimax", "ministral3", "mistral"),
    *("mixtral", "nanochat", "nemotron_h", "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "seed_oss"),
    *("smollm3", "solar_open", "stablelm", "starcoder2"),
)

_OWN_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"head_dim": 8},
    "deepseek_v3": {"head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3_text": {"num_hidden_layers": 6},
    "gpt_neox": {"intermediate_size": 256},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "position_embedding_type": "rope",
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32, "num_key_value_heads": 1},
}
"""Sizes of the types whose sizes depend on each other."""

CASES: tuple[Case, ...] = (
    *(Case(name) for name in _TYPES),
    *(Case(name, changes=sizes) for name, sizes in _OWN_SIZES.items()),
    *(
        Case(type_, variant, {"rope_parameters": rope})
        for type_ in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "seed_oss")
        for variant, rope in _ROPES.items()
    ),
    Case("llama", "untied", {"tie_word_embeddings": False}),
    Case("llama", "gelu", {"hidden_act": "gelu"}),
    Case("mixtral", "gelu", {"hidden_act": "gelu"}),
    Case("qwen2", "relu", {"hidden_act": "relu"}),
    Case("mistral", "window", {"sliding_window": 16}),
    Case("mixtral", "window", {"sliding_window": 16}),
    Case("phi3", "window", {"sliding_window": 16}),
    Case(
        "qwen2",
        "window",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * 4,
        },
    ),
    Case("starcoder2", "window", {"sliding_window": 16}),
    Case("gemma2", "window", {"sliding_window": 16}),
    Case("gemma3_text", "window", {"sliding_window": 16, "num_hidden_layers": 6}),
    Case("olmo3", "window", {"sliding_window": 16}),
    Case("cohere2", "window", {"sliding_window": 16}),
    Case("gpt_oss", "window", {"sliding_window": 16}),
    Case(
        "phi3",
        "longrope",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.0 + 2.0 * i for i in range(8)],
                "original_max_position_embeddings": 64,
            },
            "original_max_position_embeddings": 64,
        },
    ),
)
