"""Checkpoints of base models, which have no output layer."""

from __future__ import annotations

from collections.abc import Iterable

_PREFIX = "model."
_FIRST = "embed_tokens.weight"
_OTHERS = (_PREFIX, "language_model.", "lm_head.")


def missing_prefix(names: Iterable[str]) -> str:
    """Return the prefix that the tensors of a checkpoint lack; empty if they have their names.

    transformers saves a base model with names such as ``layers.0.mlp.up_proj.weight``, as in
    Qwen3-Embedding. mlx_lm builds models with an output layer beside the base model, whose tensors
    are below ``model``.

    Args:
        names: Names of the tensors in the weight files.
    """
    present = set(names)
    has_prefix = any(name.startswith(_OTHERS) for name in present)
    return _PREFIX if _FIRST in present and not has_prefix else ""
