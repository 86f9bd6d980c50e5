"""Settings with several names, and settings derived by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAME = (
    ("num_experts", "num_local_experts"),
    ("n_ctx", "n_positions"),
    ("rotary_emb_base", "rope_theta"),
    ("block_dim", "hidden_size"),
    ("sliding_window_pattern", "_sliding_window_pattern"),
)
"""Names with the same meaning. The first name that is set gives its value to the others."""

_FIXED: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
}
"""Settings with one value in all models of a type, which newer files omit."""

_LAYER_NAMES = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
}
"""Names of layer types in transformers 5, mapped to mlx_lm's names."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


def with_aliases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with each setting under all of its names.

    Args:
        config: ``config.json``, or its text part; not modified.
    """
    values = dict(config)
    for names in _SAME:
        said = next((values[name] for name in names if values.get(name) is not None), None)
        if said is not None:
            values.update({name: said for name in names if values.get(name) is None})
    for name, value in _FIXED.get(str(values.get("model_type")), {}).items():
        values.setdefault(name, value)
    _rename_layers(values)
    if values.get("model_type") == "mamba2":
        _add_inner_size(values)
    _add_head_size(values)
    _add_pattern(values)
    values.setdefault("rope_scaling", None)
    return values


def _rename_layers(values: dict[str, Any]) -> None:
    renamed, kinds = _LAYER_NAMES.get(str(values.get("model_type"))), values.get("layer_types")
    if renamed and isinstance(kinds, list):
        values["layer_types"] = [renamed.get(kind, kind) for kind in kinds]


def _add_inner_size(values: dict[str, Any]) -> None:
    expand, hidden = values.get("expand"), values.get("hidden_size")
    if isinstance(expand, int) and isinstance(hidden, int):
        values.setdefault("intermediate_size", expand * hidden)


def _add_head_size(values: dict[str, Any]) -> None:
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("head_dim") is None and type(hidden) is type(heads) is int and heads > 0:
        values["head_dim"] = hidden // heads


def _add_pattern(values: dict[str, Any]) -> None:
    """Express a list of layer types as "every Nth layer is global"."""
    kinds = values.get("layer_types")
    if not isinstance(kinds, list) or set(kinds) - {_FULL, _SLIDING}:
        return
    if values.get("model_type") == "exaone4":
        values["sliding_window_pattern"] = _letters(kinds)
    elif kinds:
        # The list takes precedence over an existing pattern: it is newer and more expressive.
        values["sliding_window_pattern"] = [*kinds, _FULL].index(_FULL) + 1


def _letters(kinds: list[str]) -> str | None:
    """Return layer types as EXAONE 4's original string, a letter each; None without windows."""
    if _SLIDING not in kinds:
        return None
    return "".join("L" if kind == _SLIDING else "G" for kind in kinds)
