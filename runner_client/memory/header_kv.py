"""Size of a model's KV cache, after the cache classes of mlx_lm 0.32.

``mlx_lm.models.cache``: ``KVCache`` grows in steps of 256 tokens; ``RotatingKVCache`` does too,
up to the window of a layer with sliding attention.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_common.safetensors import Tensor

STEP_TOKENS = 256

_PROJECTION = re.compile(r"^(?P<stack>.*?)layers\.(?P<layer>\d+)\..*\b(?P<kind>[kv])_proj\.weight$")

# mlx_lm gives a rotating cache to layers with sliding attention, found by a list of layer types or
# by "every Nth layer is global" with these defaults (window, N). Other architectures may have
# windows too, but mlx_lm keeps the whole context.
_BY_TYPE = frozenset(
    (
        *("llama", "mistral", "ministral3", "gpt_oss", "olmo3", "afmoe"),
        *("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
    )
)
_BY_PATTERN = {"gemma3": (512, 6), "gemma3_text": (512, 6), "cohere2": (4096, 4)}

# mlx_lm caches whole heads for these, and only the latent for other MLA models.
_EXPANDED_MLA = frozenset(("deepseek_v2", "minicpm3", "youtu_llm"))


@dataclass(frozen=True, slots=True)
class KVLayer:
    """The cache of one layer.

    Attributes:
        elements_per_token: Numbers in the keys and values of one token.
        window: The maximum number of tokens held; None for the whole context.
    """

    elements_per_token: int
    window: int | None = None

    def elements(self, context_length: int) -> int:
        """Return how many numbers are allocated for a sequence of ``context_length`` tokens."""
        tokens = -(-context_length // STEP_TOKENS) * STEP_TOKENS
        return self.elements_per_token * (
            tokens if self.window is None else min(tokens, self.window)
        )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model, which multimodal configurations nest."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else dict(config)


def kv_layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[KVLayer, ...]:
    """Return the caches of one sequence, one for each layer with a cache.

    The shapes of the projections take precedence over the configuration, which omits values equal
    to an architecture's defaults. Empty if neither gives the size.
    """
    text = text_config(config)
    layers = _integer(text, "num_hidden_layers", "n_layers", "n_layer", "num_layers") or 0
    elements = _latent_elements(text, layers) or _projected_elements(tensors)
    if not elements:
        elements = dict.fromkeys(range(layers), _configured_elements(text))
    cached = max(elements, default=-1) + 1 - (_integer(text, "num_kv_shared_layers") or 0)
    return tuple(
        KVLayer(count, _window(text, layer))
        for layer, count in sorted(elements.items())
        if layer < cached and count
    )


def _latent_elements(text: Mapping[str, Any], layers: int) -> dict[int, int]:
    """Return the elements of multi-head latent attention: a compressed vector and a rotary key."""
    rank, rotary = _integer(text, "kv_lora_rank"), _integer(text, "qk_rope_head_dim") or 0
    if not rank:
        return {}
    if text.get("model_type") not in _EXPANDED_MLA:
        return dict.fromkeys(range(layers), rank + rotary)
    key = (_integer(text, "qk_nope_head_dim") or 0) + rotary
    value = _integer(text, "v_head_dim") or key
    heads = _integer(text, "num_attention_heads") or 0
    return dict.fromkeys(range(layers), heads * (key + value))


def _projected_elements(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """Return the rows of each layer's key and value projections, in the largest stack of layers."""
    stacks: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        match = _PROJECTION.match(name)
        if match and tensor.shape:
            stacks[match["stack"]][int(match["layer"])][match["kind"]] = tensor.shape[0]
    # Multimodal and draft-head checkpoints contain other stacks beside the text stack.
    stack = max(stacks.values(), key=len, default={})
    # A layer without its own values caches the keys twice.
    return {
        layer: rows.get("k", 0) + rows.get("v", rows.get("k", 0)) for layer, rows in stack.items()
    }


def _configured_elements(text: Mapping[str, Any]) -> int:
    """Return 2 x KV heads x head size, from the configuration."""
    heads = _integer(text, "num_attention_heads", "n_heads", "n_head") or 0
    kv_heads = _integer(text, "num_key_value_heads", "num_kv_heads") or heads
    hidden = _integer(text, "hidden_size", "n_embd", "d_model") or 0
    head_dim = _integer(text, "head_dim") or (hidden // heads if heads else 0)
    return 2 * kv_heads * head_dim


def _window(text: Mapping[str, Any], layer: int) -> int | None:
    model_type = text.get("model_type")
    window = _integer(text, "sliding_window")
    if model_type in _BY_PATTERN:
        default_window, default_every = _BY_PATTERN[model_type]
        every = _integer(text, "sliding_window_pattern") or default_every
        return None if layer % every == every - 1 else window or default_window
    types = text.get("layer_types")
    if model_type == "gpt_oss" and not types:
        types = ("sliding_attention", "full_attention") * (layer + 1)
    if model_type in _BY_TYPE and isinstance(types, (list, tuple)) and layer < len(types):
        return window if types[layer] == "sliding_attention" else None
    return None


def _integer(settings: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of the named settings with a positive integer."""
    for name in names:
        value = settings.get(name)
        if type(value) is int and value > 0:
            return value
    return None
