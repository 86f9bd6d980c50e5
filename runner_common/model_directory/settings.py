"""Detection of settings with unusable values.

mlx_lm computes with any value: a string in place of a number causes an error that does not name the
setting, and some values, such as a string for a sliding window, are silently ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from runner_common.model_directory.rope import FULL, SLIDING, rope_kind

Check = Callable[[Any], bool]

_MAX_COUNT = 2**31 - 1


def wrong_setting(config: Mapping[str, Any]) -> str | None:
    """Return a description of the first unusable setting; None if there is none.

    Args:
        config: ``config.json``; its text part is checked as well.
    """
    text = config.get("text_config")
    parts = {"": config}
    if isinstance(text, dict):
        parts["text_config."] = text
    found = (problem for path, part in parts.items() for problem in _problems(path, part))
    return next(found, None)


def _problems(path: str, part: Mapping[str, Any]) -> Iterator[str]:
    yield from _unfit(path, part, _SETTINGS)
    for key, value in part.items():
        if isinstance(value, float) and math.isnan(value):
            yield f"{path}{key} is NaN"
    quantization = part.get("quantization")
    if isinstance(quantization, dict):
        yield from _unfit(f"{path}quantization.", quantization, _QUANTIZATION)
    new, old = part.get("rope_parameters"), part.get("rope_scaling")
    for name, rope in (("rope_parameters", new), ("rope_scaling", old)):
        if isinstance(rope, dict):
            yield from _rope_problems(f"{path}{name}", rope)
    if isinstance(new, dict) and isinstance(old, dict):
        yield from _contradictions(path, new, old)


def _unfit(path: str, part: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> Iterator[str]:
    for key, (expected, is_fit) in kinds.items():
        value = part.get(key)
        if value is not None and not is_fit(value):
            yield f"{path}{key} is {_shown(value)}; expected {expected}"


def _rope_problems(path: str, rope: Mapping[str, Any]) -> Iterator[str]:
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    for kind in (FULL, SLIDING):
        if rope.get(kind) is not None and kind not in nested:
            yield f"{path}.{kind} is {_shown(rope[kind])}; expected an object"
    for key, value in nested.items():
        yield from _rope_problems(f"{path}.{key}", value)
    yield from _unfit(f"{path}.", rope, _ROPE)
    kind = rope_kind(rope)
    if kind in _NEED_FACTOR and rope.get("factor") is None:
        yield f"{path} has no factor, which {kind!r} needs"


def _contradictions(path: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[str]:
    """Yield parameters that differ between the two objects; transformers uses the older one."""
    for key in sorted(new.keys() & old.keys() - {"type", "rope_type"}):
        if new[key] != old[key]:
            yield f"{path}rope_parameters.{key} and {path}rope_scaling.{key} differ"
    kinds = [rope_kind(rope) for rope in (new, old) if {"type", "rope_type"} & rope.keys()]
    if len(set(kinds)) > 1:
        yield f"{path}rope_parameters and {path}rope_scaling name two kinds: {', '.join(kinds)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return False


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _is_size(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_length(value: object) -> bool:
    return _is_number(value) and 1 <= value <= _MAX_COUNT


def _each(is_fit: Check) -> Check:
    """Return a check that also accepts a list of valid values, as some types have one per layer."""
    return lambda value: (
        all(item is None or is_fit(item) for item in value)
        if isinstance(value, list)
        else is_fit(value)
    )


def _is_a(*types: type) -> Check:
    return lambda value: isinstance(value, types)


def _is_list_of(type_: type | tuple[type, ...]) -> Check:
    return lambda value: isinstance(value, list) and all(isinstance(item, type_) for item in value)


_Kind = tuple[str, Check]

_SIZE = ("a whole number above 0", _is_size)
_COUNT = ("a whole number", _is_count)
_COUNTS = ("a whole number", _each(_is_count))
_POSITIVE = ("a number above 0", _is_positive)
_SHARE = ("a number above 0, at most 1", _is_share)
_NUMBER = ("a number", _is_number)
_OBJECT = ("an object", _is_a(dict))
_KIND = ("a string", _is_a(str))
_FACTORS = (
    "a list of numbers",
    lambda value: isinstance(value, list) and all(map(_is_number, value)),
)

_SETTINGS: dict[str, _Kind] = {
    "head_dim": _COUNT,
    "hidden_size": _SIZE,
    "intermediate_size": _COUNTS,
    "layer_norm_eps": _POSITIVE,
    "layer_norm_epsilon": _POSITIVE,
    "layer_types": ("a list of strings", _is_list_of(str)),
    "norm_eps": _POSITIVE,
    "num_attention_heads": ("a whole number above 0", _each(_is_size)),
    "num_experts_per_tok": _COUNTS,
    "num_hidden_layers": _SIZE,
    "num_key_value_heads": _COUNTS,
    "partial_rotary_factor": _SHARE,
    "quantization": _OBJECT,
    "quantization_config": _OBJECT,
    "rms_norm_eps": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "rope_parameters": _OBJECT,
    "rope_scaling": ("an object", lambda value: value is False or isinstance(value, dict)),
    "rope_theta": ("a number above 0", _each(_is_positive)),
    "rotary_emb_base": _POSITIVE,
    "rotary_pct": _SHARE,
    "sliding_window": ("a whole number", _is_count),
    "text_config": _OBJECT,
    "tie_word_embeddings": ("true or false", _is_a(bool)),
    "use_sliding_window": ("true or false", _is_a(bool)),
    "vocab_size": _SIZE,
}
"""Settings of many model types, with checks of their values."""

_ROPE: dict[str, _Kind] = {
    "attention_factor": _NUMBER,
    "beta_fast": _NUMBER,
    "beta_slow": _NUMBER,
    "factor": _POSITIVE,
    "high_freq_factor": _NUMBER,
    "long_factor": _FACTORS,
    "low_freq_factor": _NUMBER,
    "mscale": _NUMBER,
    "mscale_all_dim": _NUMBER,
    "original_max_position_embeddings": ("a number of tokens", _is_length),
    "partial_rotary_factor": _SHARE,
    "rope_theta": _POSITIVE,
    "rope_type": _KIND,
    "short_factor": _FACTORS,
    "type": _KIND,
}
"""Settings of the objects that describe rotary embeddings, with checks of their values."""

_QUANTIZATION: dict[str, _Kind] = {"bits": _COUNT, "group_size": _COUNT}

_NEED_FACTOR = frozenset(("dynamic", "linear", "llama3", "yarn"))
