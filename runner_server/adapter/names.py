"""Every name this project takes from mlx_lm, in one place. Tested with 0.32.2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


class _Library:
    """``mlx.core`` with another function for files.

    Args:
        library: What all other names are taken from.
        load: In place of ``load``.
    """

    def __init__(self, library: Any, load: Callable[[str], Mapping[str, Any]]) -> None:
        self._library = library
        self.load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def build_model(path: Path, load: Callable[[str], Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Call mlx_lm's ``load_model``, which leaves all weights lazy.

    Args:
        path: The model's directory.
        load: Returns the arrays of a weight file; mlx_lm calls it in place of ``mx.load``.
    """
    library = _utils.mx
    vars(_utils)["mx"] = _Library(library, load)
    try:
        model, config = load_model(path, lazy=True)
    finally:
        vars(_utils)["mx"] = library
    return model, config
