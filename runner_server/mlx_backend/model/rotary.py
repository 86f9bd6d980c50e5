"""Checks and corrections of a model's rotary embeddings.

mlx_lm 0.32.2 computes LongRoPE frequencies for long sequences only, and ignores YaRN's
``attention_factor`` and ``truncate``. The formulas are those of transformers'
``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.positional_encoding import RoPE

from runner_common.model_directory import has_rope_by_kind, rope_kind
from runner_server.mlx_backend.model.activations import written_in
from runner_server.mlx_backend.upstream.names import BuiltModel

_PLAIN_THETA = 10_000.0
_SHARES = frozenset(
    (
        "partial_rotary_factor",
        "partial_rotary_factors",
        "qk_rope_head_dim",
        "rotary_dim",
        "rotary_pct",
    )
)
"""Keys under which a class accepts the fraction of a head that is rotated."""

_CLASSES = {
    "deepseek_yarn": ("Yarn",),
    "dynamic": ("DynamicNTK",),
    "llama3": ("Llama3RoPE",),
    "longrope": ("SuScaledRoPE", "LongRoPE"),
    "proportional": ("Proportional",),
    "su": ("SuScaledRoPE", "LongRoPE"),
    "telechat3-yarn": ("Yarn",),
    "yarn": ("Yarn",),
}
"""Kinds of scaling, with parts of the names of the classes that implement each of them."""


def ignored_rope(text: Mapping[str, Any], built: BuiltModel) -> Iterator[str]:
    """Yield problems for the rotary settings ignored by a model.

    Args:
        text: The language model's part of the configuration.
        built: The model.
    """
    taken = built.arguments
    if has_rope_by_kind(text):
        yield from _lacking_kinds(text)
        return
    scaling = text.get("rope_scaling")
    if isinstance(scaling, dict) and not _is_scaled(scaling, built):
        yield f"rope_scaling = {scaling!r} in config.json has no effect in mlx_lm"
    share = _unused_share(text, taken)
    if share and not _can_share(built.model, text):
        yield f"partial_rotary_factor = {share!r} in config.json has no effect in mlx_lm"
    if "rope_parameters" in taken:
        return
    theta, local = text.get("rope_theta"), text.get("rope_local_base_freq")
    bases = {"rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_base"}
    if theta not in (None, _PLAIN_THETA) and not bases & taken:
        yield f"rope_theta = {theta!r} in config.json has no effect in mlx_lm"
    locals_ = {"rope_local_base_freq", "rope_local_theta", "swa_rope_theta"}
    if local not in (None, theta) and not locals_ & taken:
        yield (
            f"rope_parameters.sliding_attention.rope_theta = {local!r} in config.json has no "
            "effect in mlx_lm"
        )
    yield from _ignored_kinds(text)


def _ignored_kinds(text: Mapping[str, Any]) -> Iterator[str]:
    """Yield problems for parameters of a kind of attention that mlx_lm does not distinguish."""
    for kind, rope in (text.get("rope_parameters") or {}).items():
        if not isinstance(rope, Mapping) or kind == "full_attention":
            continue
        is_used = kind in (text.get("layer_types") or (kind,))
        is_plain = kind == "sliding_attention" and rope_kind(rope) == "default"
        if is_used and not is_plain and rope != text["rope_parameters"].get("full_attention"):
            yield f"rope_parameters.{kind} = {rope!r} in config.json has no effect in mlx_lm"


def _lacking_kinds(text: Mapping[str, Any]) -> Iterator[str]:
    """Yield problems for parameters that name no kind of attention, where the type needs kinds."""
    rope = text.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        return
    for name in ("rope_parameters", "rope_theta", "rope_scaling"):
        if text.get(name) not in (None, {}, _PLAIN_THETA):
            yield f"{name} = {text[name]!r} in config.json names no kind of attention"


def exact_length(text: Mapping[str, Any]) -> int | None:
    """Return the longest sequence, in tokens, for LongRoPE's short factors; None if not used."""
    scaling = text.get("rope_scaling")
    if rope_kind(scaling) not in ("longrope", "su") or not isinstance(scaling, Mapping):
        return None
    original = scaling.get("original_max_position_embeddings")
    same = scaling.get("short_factor") == scaling.get("long_factor")
    return original if isinstance(original, int) and not same else None


def settle_rope(
    model: Module, text: Mapping[str, Any], taken: frozenset[str], context_length: int
) -> None:
    """Correct a model's rotary embeddings for the context length in force.

    Args:
        model: The model.
        text: The language model's part of the configuration.
        taken: The configuration keys that the model's classes accept.
        context_length: The longest sequence, in tokens.
    """
    scaling = text.get("rope_scaling")
    share = _unused_share(text, taken)
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, RoPE) and share and module.dims == text.get("head_dim"):
            module.dims = int(module.dims * share)
        if not isinstance(scaling, Mapping):
            continue
        if name == "SuScaledRoPE":
            _settle_longrope(module, scaling, context_length)
        elif name == "YarnRoPE":
            _settle_yarn(module, scaling, text)


def _unused_share(text: Mapping[str, Any], taken: frozenset[str]) -> float | None:
    """Return the configured fraction of a head to rotate if the model's classes ignore it."""
    share: float | None
    if kinds := _kinds(text):
        shares = [each.get("partial_rotary_factor", 1) for each in kinds]
        # A class that takes parameters by kind of attention applies the fraction of each.
        share = None if "rope_parameters" in taken else min(shares)
    else:
        share = text.get("partial_rotary_factor", text.get("rotary_pct"))
    return None if share == 1 or _SHARES & taken else share


def _kinds(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parameters of each kind of attention; empty if all kinds share them."""
    rope = text.get("rope_parameters") or {}
    return [each for each in rope.values() if isinstance(each, Mapping)]


def _can_share(model: Module, text: Mapping[str, Any]) -> bool:
    """Return whether :func:`settle_rope` can set the rotated fraction in every embedding."""
    if _kinds(text):
        return False
    ropes = [module for module in model.modules() if _is_rope(module)]
    sizes = {rope.dims for rope in ropes if isinstance(rope, RoPE)}
    head = text.get("head_dim")
    share = text.get("partial_rotary_factor")
    wanted = int(head * share) if head and share else None
    return bool(ropes) and all(isinstance(rope, RoPE) for rope in ropes) and sizes <= {head, wanted}


def _is_scaled(scaling: Mapping[str, Any], built: BuiltModel) -> bool:
    kind = rope_kind(scaling)
    if kind in ("default", "mrope"):
        return True
    if not {"rope_scaling", "rope_parameters"} & built.arguments:
        return False
    is_known = kind == "linear" or kind in _CLASSES
    if not is_known and not re.search(rf"['\"]{re.escape(kind)}['\"]", written_in(built)):
        return False
    ropes = [module for module in built.model.modules() if _is_rope(module)]
    if not ropes:  # computed by the layers themselves
        return True
    if kind == "linear":
        return any(not isinstance(rope, RoPE) or rope.scale != 1 for rope in ropes)
    classes = _CLASSES.get(kind)
    names = [type(rope).__name__ for rope in ropes]
    return classes is None or any(part in name for part in classes for name in names)


def _is_rope(module: Module) -> bool:
    name = type(module).__name__.lower()
    return "rope" in name or "rotary" in name


def _settle_longrope(rope: Any, scaling: Mapping[str, Any], context_length: int) -> None:
    if scaling.get("attention_factor") is not None:
        rope._scale = float(scaling["attention_factor"])  # noqa: SLF001 - no public name
    if context_length <= rope.original_max_position_embeddings:
        short, long = (mx.array(scaling[key]) for key in ("short_factor", "long_factor"))
        rope._freqs *= short / long  # noqa: SLF001 - no public name


def _settle_yarn(rope: Any, scaling: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    if scaling.get("attention_factor") is not None:
        rope.mscale = float(scaling["attention_factor"])
    if scaling.get("truncate") is False:
        theta = float(text["rope_theta"])
        rope._freqs = _yarn_frequencies(rope.dims, scaling, theta)  # noqa: SLF001 - no public name


def _yarn_frequencies(dims: int, scaling: Mapping[str, Any], base: float) -> mx.array:
    """Return wavelengths over 2 pi, shape ``(dims / 2,)``, without rounding YaRN's bounds."""
    original = scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(dimension(scaling.get("beta_fast", 32)), 0)
    high = min(dimension(scaling.get("beta_slow", 1)), dims - 1)
    high += 0.001 * (low == high)
    ramp = mx.clip((mx.arange(dims // 2) - low) / (high - low), 0, 1)
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    kept = 1 - ramp
    stretched = scaling["factor"] * plain
    frequencies: mx.array = (stretched * plain) / (stretched * kept + plain * (1 - kept))
    return frequencies
