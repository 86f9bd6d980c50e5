"""Normalization of rotary position embeddings, which have two forms in files.

transformers 5 writes one object, ``rope_parameters``, which includes ``rope_theta``. For models
with two kinds of attention it has one such object per kind. transformers 4 wrote ``rope_theta`` and
``rope_scaling``. See ``modeling_rope_utils.py`` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"
_PLAIN = frozenset((None, "default"))
_BESIDE = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
"""Parameters of the object, mapped to their top-level names in older files."""

_EXTENDING = frozenset(("yarn", "linear", "dynamic"))
"""Kinds whose factor extends the configured context. For other kinds it is already included."""

_BY_KIND = ("gemma4", "laguna", "mellum", "spark2_5")
"""Prefixes of model types whose ``rope_parameters`` are keyed by the kind of attention."""

_ALREADY_EXTENDED = ("gemma3", "gemma4")
"""Model types whose ``max_position_embeddings`` includes the factor, as vLLM assumes too."""


def with_one_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the rotary embeddings in both forms.

    Args:
        config: ``config.json``, or its text part; not modified.
    """
    values = dict(config)
    new = values.get("rope_parameters")
    if isinstance(new, dict) and new:
        full, sliding = _by_attention(new)
        if full is not new:
            # A partial_rotary_factor at the top applies to all layers.
            full = {key: full[key] for key in full if key != "partial_rotary_factor"}
        _add_older_names(values, full)
        theta = (sliding or {}).get("rope_theta")
        if theta is not None:
            values.setdefault("rope_local_base_freq", theta)
    if isinstance(values.get("rope_scaling"), dict):
        scaling = values["rope_scaling"] = _scaling(values["rope_scaling"], values)
        if scaling and _ORIGINAL in scaling:
            values.setdefault(_ORIGINAL, scaling[_ORIGINAL])
    if not has_rope_by_kind(config):
        _add_newer_name(values)
    return values


def has_rope_by_kind(config: Mapping[str, Any]) -> bool:
    """Return whether a model type has parameters per kind of attention, even in older files."""
    return str(config.get("model_type", "")).startswith(_BY_KIND)


def rope_kind(scaling: object) -> str:
    """Return the kind of a ``rope_scaling``; ``"default"`` for none."""
    if not isinstance(scaling, Mapping):
        return "default"
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return str(kind)


def context_factor(config: Mapping[str, Any], longest: int) -> float:
    """Return the factor by which scaling extends the configured context.

    Args:
        config: Text part of a normalized configuration.
        longest: The configured ``max_position_embeddings``.
    """
    scaling = config.get("rope_scaling")
    if rope_kind(scaling) not in _EXTENDING or not isinstance(scaling, Mapping):
        return 1.0
    factor = scaling.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor > 1:
        return 1.0
    if str(config.get("model_type", "")).startswith(_ALREADY_EXTENDED):
        return 1.0
    original = scaling.get("original_max_position_embeddings")
    if not isinstance(original, int | float) or isinstance(original, bool) or original <= 0:
        return float(factor)
    # `longest` is the extended length in some files, and the original one in others.
    return max(1.0, original * factor / longest)


def _by_attention(new: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Return the parameters of full attention, and of sliding attention if separate."""
    full, sliding = new.get(FULL), new.get(SLIDING)
    if not isinstance(full, dict):
        return (sliding if isinstance(sliding, dict) else new), None
    return full, sliding if isinstance(sliding, dict) else None


def _add_older_names(values: dict[str, Any], new: Mapping[str, Any]) -> None:
    for name, older in _BESIDE.items():
        # transformers prefers the object's value if both are set.
        if new.get(name) is not None:
            values.update(dict.fromkeys(older, new[name]))
    if rope_kind(new) not in _PLAIN and not values.get("rope_scaling"):
        values["rope_scaling"] = {key: new[key] for key in new if key != "rope_theta"}


def _add_newer_name(values: dict[str, Any]) -> None:
    """Add ``rope_parameters``, the only form some types read, from the older names."""
    new, scaling = values.get("rope_parameters"), values.get("rope_scaling")
    older = {name: values.get(name) for name in _BESIDE}
    said = {name: value for name, value in older.items() if value is not None}
    if not said and not scaling:
        return
    parts = [rope for rope in (scaling, new) if isinstance(rope, dict)]
    if any(isinstance(value, dict) for rope in parts for value in rope.values()):
        return
    values["rope_parameters"] = {"rope_type": "default", **said, **(scaling or {}), **(new or {})}


def _scaling(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a ``rope_scaling`` with its kind under both names, and the implied lengths."""
    kind = rope_kind(scaling)
    if kind in _PLAIN and set(scaling) <= {"type", "rope_type", "rope_theta"}:
        return None
    # mlx_lm would use a null as a value.
    found = {key: value for key, value in scaling.items() if value is not None}
    found["type"] = found["rope_type"] = kind
    original = config.get(_ORIGINAL)
    if original is None and kind == "yarn":
        original = config.get("max_position_embeddings")
    if original is not None and kind in {"yarn", "longrope", "su", "llama3"}:
        found.setdefault(_ORIGINAL, original)
    return found
