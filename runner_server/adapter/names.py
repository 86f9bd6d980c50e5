"""Every name this project takes from mlx_lm, in one place. Tested with 0.32.2."""

from __future__ import annotations

from runner_server.adapter._lean import import_lean

_base = import_lean("mlx_lm.models.base")
_cache = import_lean("mlx_lm.models.cache")
_utils = import_lean("mlx_lm.utils")

KVCache = _cache.KVCache
RotatingKVCache = _cache.RotatingKVCache
create_causal_mask = _base.create_causal_mask
make_prompt_cache = _cache.make_prompt_cache
dequantize_model = _utils.dequantize_model
load_config = _utils.load_config
load_model = _utils.load_model
load_tokenizer = _utils.load_tokenizer
