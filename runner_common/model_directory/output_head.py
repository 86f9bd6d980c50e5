"""Decision between a tied and a separate output layer, by the tensors in the files.

``tie_word_embeddings`` has different defaults in mlx_lm, transformers 4 and transformers 5, and
some files omit or contradict it. An output layer in the files that differs from the embeddings
should be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runner_common.model_directory.weight_files import StoredTensor, has_same_bytes

_TIED = "tie_word_embeddings"
_HEAD = re.compile(
    r"((.*\.)?(lm_head|embed_out)|(model\.)?(output|head))\.(weight|qweight|weight_packed)"
)
_EMBEDDINGS = re.compile(
    r"(.*\.)?(embed_tokens|tok_embeddings|wte|embeddings|word_embeddings|embed_in)\.weight"
)


def is_headless(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], indexed: frozenset[str]
) -> bool:
    """Return whether a model has neither an output layer nor one that is tied to the embeddings.

    Args:
        config: ``config.json``.
        tensors: Tensors of the weight files.
        indexed: Names of the tensors in the index, if any.
    """
    said = _said(config)
    return bool(said) and not any(said) and not any(map(_HEAD.fullmatch, (*tensors, *indexed)))


def _said(config: Mapping[str, Any]) -> list[bool]:
    """Return what the configuration and its text part say about tied layers."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    return [part[_TIED] for part in parts if isinstance(part.get(_TIED), bool)]


def with_output_head(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    indexed: frozenset[str],
    *,
    has_head: bool = True,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the configuration with ``tie_word_embeddings`` set by the tensors, and notes.

    Args:
        config: ``config.json``; not modified.
        tensors: Tensors of the weight files.
        indexed: Names of the tensors in the index, if any.
        has_head: False for a model whose output layer is not used. mlx_lm can build it only with
            one, so it gets the embeddings, which take no memory.

    Returns:
        The configuration, and a note if the files contradict it.

    Raises:
        OSError: A weight file cannot be read.
    """
    if not has_head:
        return _with_tied(config, tied=True), ()
    said = _said(config)
    head = next((name for name in tensors if _HEAD.fullmatch(name)), None)
    if said and not any(said):
        return dict(config), ()
    if head is None:
        # An output layer in the index but in no file is missing rather than tied.
        if not said and any(_HEAD.fullmatch(name) for name in indexed):
            return _with_tied(config, tied=False), ()
        return (dict(config) if said else _with_tied(config, tied=True)), ()
    if _is_embeddings(head, tensors):
        if f"{head.removesuffix('.weight')}.scales" in tensors:
            # mlx_lm drops the weight of a tied layer, but not its scales.
            return _with_tied(config, tied=False), ()
        return (dict(config) if said else _with_tied(config, tied=True)), ()
    note = f"{_TIED} is true, but {head} differs from the embeddings, so {head} is used"
    return _with_tied(config, tied=False), ((note,) if any(said) else ())


def _with_tied(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    values = {**config, _TIED: tied}
    if isinstance(text := values.get("text_config"), dict):
        values["text_config"] = {**text, _TIED: tied}
    return values


def _is_embeddings(head: str, tensors: Mapping[str, StoredTensor]) -> bool:
    return any(
        has_same_bytes(tensors[head], stored)
        for name, stored in tensors.items()
        if _EMBEDDINGS.fullmatch(name)
    )
