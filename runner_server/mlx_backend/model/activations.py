"""Comparison of a model's activation with the one named in the configuration."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from runner_server.mlx_backend.upstream.names import BuiltModel

# hidden_activation comes first: in early Gemma files, hidden_act names an activation never used.
_KEYS = ("hidden_activation", "hidden_act", "activation_function")

_SAME = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swiglu": "silu",
    "swish": "silu",
}
"""transformers' activation names, mapped to the function they stand for."""

_GELUS = {"gelu": "gelu", "gelu_tanh": "gelu_approx"}
"""The two kinds of GELU, mapped to their names in ``mlx.nn``."""

_IN_SOURCE = {
    "gelu": r"\bgelu\(|\b_?precise_gelu\b",
    "gelu_tanh": r"\bgelu_approx\b",
    "relu": r"\brelu\((?![^\n]*square)",
    "relu2": r"\brelu2\b|\brelu_squared\b",
    "silu": r"\bsilu\b|\b_?swiglu\b|\bSwiGLU\b",
}
"""How each activation is called in mlx_lm's modules, where it is hard-coded in the layers."""


def ignored_activation(text: Mapping[str, Any], built: BuiltModel) -> Iterator[str]:
    """Yield a problem if a model does not compute the activation named in the configuration.

    Args:
        text: The language model's part of the configuration.
        built: The model.
    """
    key = _key(text, built)
    if key is None:
        return
    name, source = text[key], written_in(built)
    wanted = _SAME.get(name) if isinstance(name, str) else None
    if wanted is None:
        # Type-specific names ("gegelu", "xielu") stand for that type's only activation.
        if not isinstance(name, str) or name not in source:
            yield f"{key} = {name!r} in config.json is not an activation of this model in mlx_lm"
        return
    same = _GELUS if wanted in _GELUS else (wanted,)
    if not any(re.search(_IN_SOURCE[each], source) for each in same):
        yield f"{key} = {name!r} in config.json has no effect in mlx_lm"


def written_in(built: BuiltModel) -> str:
    """Return the source of the modules that define a model's layers."""
    return "\n".join(map(inspect.getsource, _modules(built)))


def use_named_gelu(text: Mapping[str, Any], built: BuiltModel) -> None:
    """Make a model compute the configured kind of GELU, exact or approximate.

    mlx_lm hard-codes one of the two in each type's layers. For GPT-NeoX, specified with the exact
    one, and for StarCoder2 and Gemma, specified with the approximation, 0.32.2 computes the other.

    Args:
        text: The language model's part of the configuration.
        built: The model.
    """
    key = _key(text, built)
    wanted = _SAME.get(str(text[key])) if key else None
    for module in _modules(built):
        found = [name for name in _GELUS if re.search(_IN_SOURCE[name], inspect.getsource(module))]
        if len(found) == 1 and isinstance(library := vars(module).get("nn"), ModuleType | _Gelu):
            plain = library.plain if isinstance(library, _Gelu) else library
            vars(module)["nn"] = _Gelu(plain, wanted) if wanted in _GELUS else plain


class _Gelu:
    """Proxy of ``mlx.nn`` with one function under both names of GELU.

    Args:
        plain: ``mlx.nn`` itself.
        kind: A key of ``_GELUS``.
    """

    def __init__(self, plain: ModuleType, kind: str) -> None:
        self.plain = plain
        self.gelu = self.gelu_approx = getattr(plain, _GELUS[kind])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


def _key(text: Mapping[str, Any], built: BuiltModel) -> str | None:
    """Return the key that names the activation; None if the model's class already applies it."""
    key = next((key for key in _KEYS if text.get(key) is not None), None)
    # Nemotron's class accepts the key and ignores it.
    is_read = key in built.arguments and re.search(rf"\.{key}\b", written_in(built))
    return None if is_read else key


def _modules(built: BuiltModel) -> list[ModuleType]:
    """Return the modules of mlx_lm that define a model's layers."""
    names = {type(module).__module__ for module in built.model.modules()}
    return [sys.modules[name] for name in sorted(names) if name.startswith("mlx_lm.models.")]
