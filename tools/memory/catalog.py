"""Tiny configurations of every model type that mlx_lm 0.32.2 loads.

Each has two to five layers, enough for every kind of layer of the type to occur: sliding and full
attention, recurrent layers and attention, dense layers and experts, layers that share the KV cache
of another layer.
"""

from __future__ import annotations

from typing import Any

from tools.memory.catalog_dense import DENSE
from tools.memory.catalog_hybrid import HYBRIDS
from tools.memory.catalog_moe import MIXTURES
from tools.memory.catalog_wrapped import WRAPPED

_WRITTEN: dict[str, dict[str, Any]] = {**DENSE, **MIXTURES, **HYBRIDS, **WRAPPED}

# mlx_lm maps these types to the module of another type.
_SAME_AS = {
    "iquestcoder": "llama",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "minimax_m2": "minimax",
    "phi-msft": "phixtral",
    "xverse": "llama",
}

CONFIGS: dict[str, dict[str, Any]] = {
    **_WRITTEN,
    **{name: {**_WRITTEN[other], "model_type": name} for name, other in _SAME_AS.items()},
}
"""Contents of ``config.json`` by model type."""

_NO_METAL = "its layers need Metal kernels (`No Metal back-end`)"

LEFT_OUT: dict[str, str] = {
    "bitnet": _NO_METAL,
    "muse_spark": _NO_METAL,
    "olmo": "its module calls `sys.exit(1)` unless the ai2-olmo package is installed",
}
"""Types with an mlx_lm module that are not in ``CONFIGS``, and the reason."""
