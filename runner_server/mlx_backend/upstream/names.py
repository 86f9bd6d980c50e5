"""The names used from mlx_lm, imported by this module only. Tested with 0.32.2."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runner_server.mlx_backend.upstream.contained_import import LibraryExitError, contained
from runner_server.mlx_backend.upstream.lean_import import import_lean

_base = import_lean("mlx_lm.models.base")
_cache = import_lean("mlx_lm.models.cache")
_switch_layers = import_lean("mlx_lm.models.switch_layers")
_utils = import_lean("mlx_lm.utils")

KVCache = _cache.KVCache
QuantizedKVCache = _cache.QuantizedKVCache
RotatingKVCache = _cache.RotatingKVCache
QuantizedSwitchLinear = _switch_layers.QuantizedSwitchLinear
SwitchGLU = _switch_layers.SwitchGLU
SwitchLinear = _switch_layers.SwitchLinear
SwitchMLP = _switch_layers.SwitchMLP
create_causal_mask = _base.create_causal_mask
make_prompt_cache = _cache.make_prompt_cache
dequantize_model = _utils.dequantize_model
load_model = _utils.load_model
load_tokenizer = _utils.load_tokenizer
get_classes = vars(_utils)["_get_classes"]


def use_quantized_attention(attention: Callable[..., Any]) -> None:
    """Replace mlx_lm's attention to quantized keys and values, for all models of the process."""
    vars(_base)["quantized_scaled_dot_product_attention"] = attention


@dataclass(frozen=True)
class BuiltModel:
    """A model built by mlx_lm, with lazy weights.

    Attributes:
        model: The model.
        config: Its configuration, including mlx_lm's additions about quantization.
        arguments: The configuration keys that the model's classes accept.
    """

    model: Any
    config: dict[str, Any]
    arguments: frozenset[str]


class _Library:
    """Proxy of ``mlx.core`` with another ``load``.

    Args:
        library: The module that provides all other names.
        load: The replacement for ``load``.
    """

    def __init__(self, library: Any, load: Callable[[str], Mapping[str, Any]]) -> None:
        self._library = library
        self.load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def build_model(
    path: Path,
    config: Mapping[str, Any],
    weight_files: Sequence[Path],
    load: Callable[[str], Mapping[str, Any]],
) -> BuiltModel:
    """Build a model with mlx_lm's ``load_model``, leaving the weights lazy.

    Args:
        path: The model's directory.
        config: The configuration to use instead of the one in the directory.
        weight_files: The weight files to use instead of those that mlx_lm would find.
        load: Returns the arrays of a weight file; replaces ``mx.load``.
    """
    taken: set[str] = set()
    names = {
        "mx": _Library(_utils.mx, load),
        "glob": SimpleNamespace(glob=lambda _pattern: [str(file) for file in weight_files]),
        "load_config": lambda _path: copy.deepcopy(dict(config)),
    }
    with _replaced(names), _recorded_arguments(taken), contained("mlx_lm"):
        model, final = load_model(path, lazy=True)
        arguments = get_classes(final)[1]
    return BuiltModel(model, final, frozenset(taken | _field_names(arguments)))


@contextmanager
def _replaced(names: Mapping[str, object]) -> Iterator[None]:
    """Replace some global names of ``mlx_lm.utils`` within the context."""
    space = vars(_utils)
    kept = {name: space[name] for name in names}
    space.update(names)
    try:
        yield
    finally:
        space.update(kept)


@contextmanager
def _recorded_arguments(taken: set[str]) -> Iterator[None]:
    """Record the keys accepted by each argument class built from a dictionary.

    Within the context, a configuration that lacks a required key raises ``ValueError``.
    """
    kept = vars(_base.BaseModelArgs)["from_dict"]

    def from_dict(cls: Any, params: Mapping[str, Any]) -> Any:
        taken.update(_field_names(cls))
        if lacking := _lacking(cls, params):
            raise ValueError(f"config.json lacks {', '.join(lacking)}")
        return kept.__func__(cls, params)

    _base.BaseModelArgs.from_dict = classmethod(from_dict)
    try:
        yield
    finally:
        _base.BaseModelArgs.from_dict = kept


def _lacking(arguments: Any, params: Mapping[str, Any]) -> list[str]:
    return [
        field.name
        for field in fields(arguments)
        if field.init
        and field.default is field.default_factory is MISSING
        and field.name not in params
    ]


def _field_names(arguments: Any) -> set[str]:
    return {field.name for field in fields(arguments)}


def tokenizer_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return mlx_lm's tokenizer settings for a model whose files have none."""
    try:
        with contained("mlx_lm"):
            model_class, _ = get_classes(config)
    except (ImportError, KeyError, LibraryExitError, ValueError):
        return {}
    return getattr(sys.modules[model_class.__module__], "TOKENIZER_DEFAULTS", {})


def default_end_ids(config: dict[str, Any]) -> list[int]:
    """Return mlx_lm's default end-of-text ids for a model whose files name none."""
    return [*tokenizer_defaults(config).get("eos_token_ids", [])]
