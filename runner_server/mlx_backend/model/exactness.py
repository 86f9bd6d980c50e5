"""Detection of differences between a model's files and its computation in mlx_lm.

mlx_lm reads the settings that its classes name and drops all others. It also drops tensors that a
class does not use. If a dropped setting changes the computation, or a dropped tensor is a weight,
the answers are those of another model. Such a model is refused with a list of the differences,
unless the caller allows them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from runner_common.model_directory import ModelDirectory, is_beside_text, text_part
from runner_server.mlx_backend.model.activations import ignored_activation, written_in
from runner_server.mlx_backend.model.differences import Difference
from runner_server.mlx_backend.model.rotary import exact_length, ignored_rope
from runner_server.mlx_backend.upstream.names import BuiltModel

Neutral = Callable[[Any, Mapping[str, Any]], bool]


def compare(
    directory: ModelDirectory, built: BuiltModel, unused: Iterable[str]
) -> tuple[Difference, ...]:
    """Compare a model's files with the built model.

    Args:
        directory: The model's files.
        built: The model.
        unused: Names of stored tensors that the model does not use.
    """
    config, longest = directory.configuration.values, directory.configuration.context_length
    found = (
        *_ignored_settings(config, built),
        *_limited_settings(text_part(config), built),
        *_known_faults(text_part(config)),
        *_ignored_tensors(directory, unused),
        *_misread_types(directory, built.model),
        *_whole_numbers(built.model),
    )
    return tuple(each for each in found if each.harmless_tokens < longest)


def _ignored_settings(config: Mapping[str, Any], built: BuiltModel) -> Iterator[Difference]:
    text = text_part(config)
    for key, is_neutral in _NUMBERS.items():
        value = text.get(key, config.get(key))
        if value is not None and key not in built.arguments and not is_neutral(value, text):
            yield Difference(f"{key} = {value!r} in config.json has no effect in mlx_lm")
    yield from _unknown_layers(text, built)
    yield from map(Difference, ignored_rope(text, built))
    yield from map(Difference, ignored_activation(text, built))


def _unknown_layers(text: Mapping[str, Any], built: BuiltModel) -> Iterator[Difference]:
    """Yield differences in the kinds of layers listed in the configuration."""
    kinds = text.get("layer_types") if "layer_types" in built.arguments else None
    if "layer_types" in text and not _has_pattern(text, built):
        yield Difference(
            "layer_types in config.json has no effect in mlx_lm, where every Nth layer is global"
        )
    source = written_in(built)
    for kind in sorted(set(kinds or ()) - {"full_attention"}):
        if kind not in source:
            yield Difference(
                f"layer_types has {kind!r} in config.json, which mlx_lm does not implement here"
            )
    arguments = getattr(built.model, "args", None)
    if "sliding_attention" in (kinds or ()) and getattr(arguments, "sliding_window", 1) is None:
        yield Difference(
            "layer_types has 'sliding_attention', but config.json has no sliding_window"
        )


def _has_pattern(text: Mapping[str, Any], built: BuiltModel) -> bool:
    """Return whether the class builds the kinds of layers listed in the configuration.

    Some classes do not read the list but make every Nth layer global.
    """
    kinds, every = text["layer_types"], text.get("sliding_window_pattern")
    if "layer_types" in built.arguments or "sliding_window_pattern" not in built.arguments:
        return True
    if not isinstance(kinds, list) or not isinstance(every, int) or every < 1:
        return True
    counted = [(layer + 1) % every == 0 for layer in range(len(kinds))]
    return counted == [kind == "full_attention" for kind in kinds]


def _limited_settings(text: Mapping[str, Any], built: BuiltModel) -> Iterator[Difference]:
    """Yield differences affecting long sequences only."""
    if window := _ignored_window(text, built):
        yield Difference(
            f"sliding_window = {window} in config.json has no effect in mlx_lm", window
        )
    for switch, limit in _FROM_LENGTH.items():
        length = text.get(limit)
        if text.get(switch) and switch not in built.arguments and isinstance(length, int):
            yield Difference(f"{switch} in config.json has no effect in mlx_lm", length)
    if length := exact_length(text):
        yield Difference("mlx_lm does not switch from short_factor to long_factor", length)


def _known_faults(text: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield differences between mlx_lm 0.32.2 and transformers found by comparisons.

    Raises:
        ValueError: Running the model would end the process.
    """
    model_type = text.get("model_type")
    if model_type in ("deepseek_v2", "qwen2_moe") and text.get("norm_topk_prob"):
        yield Difference(
            f"norm_topk_prob in config.json has no effect in mlx_lm for {model_type!r} models"
        )
    if model_type == "bailing_moe" and text.get("num_experts_per_tok") == 1:
        # Not a Difference, which a caller could allow: this one would end the process.
        raise ValueError(
            "mlx_lm's routing of bailing_moe ends the process with one expert per token"
        )
    if model_type == "phi3small":
        yield Difference(
            "mlx_lm adds a 'phi3small' model's causal mask to the attention scores as numbers, "
            "so that tokens of a prompt attend to later ones"
        )
    if model_type == "jamba" and (text.get("num_experts") or 1) > 1:
        yield Difference(
            "mlx_lm normalizes the scores of the chosen experts of a 'jamba' model, which is "
            "trained with scores over all experts"
        )


def _ignored_window(text: Mapping[str, Any], built: BuiltModel) -> int:
    """Return the attention window, in tokens, if it is configured but not applied; otherwise 0."""
    window = text.get("sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or window <= 0:
        return 0
    if not text.get("use_sliding_window", str(text.get("model_type")) not in _WINDOW_OFF):
        return 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        return 0
    if kinds is None and _is_below_windows(text):
        return 0
    has_effect = _has_window(built) if "sliding_window" in built.arguments else False
    return 0 if has_effect else window


def _is_below_windows(text: Mapping[str, Any]) -> bool:
    """Return whether windows would begin only after the model's last layer."""
    first = text.get("max_window_layers", _MAX_WINDOW_LAYERS)
    layers = text.get("num_hidden_layers")
    has_first = text.get("model_type") in ("qwen2", "qwen3")
    return has_first and isinstance(first, int) and isinstance(layers, int) and first >= layers


def _has_window(built: BuiltModel) -> bool:
    """Return whether a model whose class accepts a window has layers that apply it.

    Llama's class applies a window only to layers that the configuration names.
    """
    inner = getattr(built.model, "model", built.model)
    kinds = getattr(inner, "layer_types", None)
    return not isinstance(kinds, list) or "sliding_attention" in kinds


_MAX_WINDOW_LAYERS = 28
"""Default number of layers without a window in Qwen models, as in transformers."""

_FROM_LENGTH = {
    "attention_chunk_size": "attention_chunk_size",
    "attn_temperature_tuning": "floor_scale",
}
"""Llama 4's settings that only affect long sequences, mapped to the key with that length."""

_WINDOW_OFF = frozenset(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"))
"""Model types that apply their window only if ``use_sliding_window`` is set."""


def _is(*neutral: object) -> Neutral:
    return lambda value, _text: value in neutral


def _is_head_scale(value: Any, text: Mapping[str, Any]) -> bool:
    """Return whether a ``query_pre_attn_scalar`` is the usual one, the head size."""
    return bool(value == text.get("head_dim"))


def _is_final_cap(value: Any, text: Mapping[str, Any]) -> bool:
    # Hard-coded in mlx_lm's nanochat.
    return not value or (text.get("model_type") == "nanochat" and value == 15)


def _is_interval(value: Any, text: Mapping[str, Any]) -> bool:
    # Hard-coded in mlx_lm's Llama 4.
    return not value or (str(text.get("model_type")).startswith("llama4") and value == 4)


def _is_attention_scale(value: Any, text: Mapping[str, Any]) -> bool:
    size, is_number = text.get("head_dim"), isinstance(value, int | float)
    return bool(size and is_number and abs(value - size**-0.5) < 1e-6)


_NUMBERS: dict[str, Neutral] = {
    "alibi": _is(0),
    "attention_multiplier": _is_attention_scale,
    "attn_logit_softcapping": _is(0),
    "clip_qkv": _is(0),
    "dim_model_base": lambda value, text: value == text.get("hidden_size"),
    "embedding_multiplier": _is(1),
    "final_logit_softcapping": _is_final_cap,
    "full_attn_alpha_factor": _is(1),
    "full_attn_beta_factor": _is(1),
    "is_causal": _is(1),
    "key_multiplier": _is(1),
    "linear_attn_alpha_factor": _is(1),
    "linear_attn_beta_factor": _is(1),
    "lm_head_multiplier": _is(1),
    "logit_scale": _is(1),
    "logits_scaling": _is(1),
    "logits_soft_cap": _is(0),
    "mlp_alpha_factor": _is(1),
    "mlp_beta_factor": _is(1),
    "moe_apply_router_weight_on_input": _is(0),
    "no_rope_layer_interval": _is_interval,
    "query_pre_attn_scalar": _is_head_scale,
    "residual_multiplier": _is(1),
    "routed_scaling_factor": _is(1),
    "scale_attn_by_inverse_layer_idx": _is(0),
    "scale_attn_weights": _is(1),
    "scale_depth": _is(1),
    "scale_emb": _is(1),
    "swiglu_alpha": _is(1.702),
    "swiglu_limit": _is(7),
    "time_step_scale": _is(1),
    "use_alibi": _is(0),
    "use_bidirectional_attention": _is(0),
}
"""Settings that change numbers, with a predicate for values that have no effect."""

_DROPPABLE = re.compile(
    # Tables that are recomputed.
    r"(inv_freq|cos_cached|sin_cached|position_ids|num_batches_tracked|embed_scale)$"
    r"|(^|\.)rope\.freqs$|\.(attn|attention)\.(bias|masked_bias)$"
    # Layers for multi-token prediction.
    r"|(^|\.)(mtp\w*|nextn\w*|eagle\w*)\."
    # Scales of 8-bit caches and activations, which have more bits here.
    r"|\.([qkv]|kv|prob|attn)_scale$|\.(input|activation)_scale\w*$|weight_shape$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NAMED = 3


def _ignored_tensors(directory: ModelDirectory, unused: Iterable[str]) -> Iterator[Difference]:
    layers = text_part(directory.configuration.values).get("num_hidden_layers")
    names = [name for name in unused if not _is_droppable(name, layers)]
    tied = directory.configuration.values.get("tie_word_embeddings")
    names = [name for name in names if not (tied and "lm_head." in name)]
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        listed = ", ".join(sorted(names)[:_NAMED])
        yield Difference(f"{listed}{more} in its weight files would not be used by mlx_lm")


def _is_droppable(name: str, layers: object) -> bool:
    if _DROPPABLE.search(name) or is_beside_text(name):
        return True
    layer = _LAYER.search(name)
    # After the last layer, some types store layers for multi-token prediction.
    return bool(layer and isinstance(layers, int) and int(layer[1]) >= layers)


def _misread_types(directory: ModelDirectory, model: Module) -> Iterator[Difference]:
    """Yield a weight of 8-bit floats left as the integers that MLX reads from the file."""
    if not any(stored.tensor.dtype.startswith("F8") for stored in directory.tensors.values()):
        return
    for name, value in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())):
        if value.dtype == mx.uint8 and not name.endswith("scales"):
            yield Difference(
                f"{name} is stored as 8-bit floats, which mlx_lm reads as the integers 0 to 255 "
                f"for {directory.configuration.model_type}"
            )
            return


def _whole_numbers(model: Module) -> Iterator[Difference]:
    """Yield a weight stored as integers without scales."""
    for path, module in model.named_modules():
        if any("scale" in name for name in module):
            continue
        for name in ("weight", "bias"):
            value = module.get(name)
            if isinstance(value, mx.array) and not mx.issubdtype(value.dtype, mx.floating):
                kind = str(value.dtype).removeprefix("mlx.core.")
                yield Difference(f"{path}.{name} is stored as {kind}, without scales")
                return
